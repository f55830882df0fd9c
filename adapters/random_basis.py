"""A basis for random weights: as orthonormal as a real one, made in seconds, never cached.

The canonical basis of an 8B model takes an eigendecomposition of every weight; where the weights
are random numbers, what adapters do to them means nothing, and any basis will do.
"""

from collections.abc import Callable

import torch

from shoal.adapters.basis import Basis, make_basis
from shoal.adapters.spec import BaseShape, Target


@torch.no_grad()
def random_basis(
    shape: BaseShape,
    rank: int,
    device: torch.device,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Basis:
    """Seeded orthonormal columns for every target, ``min(rank, d_out, d_in)`` of them.

    Equal for equal arguments on equal devices. It says that it is canonical and belongs to
    ``shape.digest``, which must therefore be the digest of no real base.
    """
    if rank < 1:
        raise ValueError(f"basis rank {rank} must be at least 1")
    generator = torch.Generator(device).manual_seed(seed)
    factors: dict[Target, torch.Tensor] = {}
    targets = shape.targets()
    for done, target in enumerate(targets):
        if progress is not None:
            progress(done, len(targets))
        dims = shape.dims[target.module]
        drawn = torch.empty(dims.d_out, min(rank, *dims), device=device)
        factors[target] = torch.linalg.qr(drawn.normal_(generator=generator)).Q
    if progress is not None:
        progress(len(targets), len(targets))
    return make_basis(factors, kind="canonical", base_digest=shape.digest)
