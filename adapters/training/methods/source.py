"""``Source``: the base that methods start from: its weights and their decompositions.

Each decomposition is computed when it is first asked for, for all targets, and kept in the cache
directory under the base's digest, so that only the first run on a base waits for it.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from shoal.adapters.basis import (
    DEFAULT_RANK,
    Basis,
    Kind,
    Progress,
    canonical_basis,
    load_basis,
    make_basis,
    save_basis,
)
from shoal.adapters.corrections import columns
from shoal.adapters.errors import AdapterRejected
from shoal.adapters.spec import BaseShape, Target
from shoal.adapters.spectral_basis import SpectralBasis
from shoal.adapters.weights import WeightOf

log = logging.getLogger(__name__)

# Of the randomised SVD: columns beyond the rank, and multiplications by W Wᵀ. 16 directions of
# SmolLM2's weights then hold, as ‖UᵀW‖², 0.987 of what the exact ones hold (0.956 at the least).
OVERSAMPLING = 16
ITERATIONS = 4


class Source:
    """The base's weights, and what was computed of them.

    Attributes:
        weight_of: the weights before they were rounded to what training runs in.
        shape: the base.
    """

    def __init__(
        self,
        weight_of: WeightOf,
        shape: BaseShape,
        cache_dir: Path,
        *,
        basis_rank: int | None = None,
        progress: bool = False,
    ) -> None:
        """Reads and computes nothing.

        Args:
            weight_of, shape: the base.
            cache_dir: where decompositions are kept.
            basis_rank: rank of the canonical basis; None: as servers have it.
            progress: draw progress bars on standard error.
        """
        self.weight_of = weight_of
        self.shape = shape
        self._cache_dir = cache_dir
        self._basis_rank = DEFAULT_RANK if basis_rank is None else basis_rank
        self._progress = progress
        self._others: dict[tuple[str, int], Basis] = {}

    @cached_property
    def canonical(self) -> Basis:
        """The basis that LoRA-XS adapters of this base share: leading left singular vectors."""
        with self._bar("basis") as report:
            return canonical_basis(
                self.weight_of, self.shape, self._basis_rank, self._cache_dir, report
            )

    def leading(self, rank: int) -> Basis:
        """Leading left singular vectors, exact, of at least this rank.

        The canonical basis where it has as many.
        """
        if rank <= self._basis_rank:
            return self.canonical
        return self._other("leading", rank, "pissa", lambda w, t: columns("pissa", w, t, rank))

    def trailing(self, rank: int) -> Basis:
        """Trailing left singular vectors of the thin SVD, smallest singular value first."""
        return self._other("trailing", rank, "milora", lambda w, t: columns("milora", w, t, rank))

    def randomised(self, rank: int) -> Basis:
        """Almost the leading left singular vectors, see `leading_columns`."""
        return self._other("randomised", rank, "uploaded", lambda w, t: leading_columns(w, t, rank))

    @cached_property
    def spectral(self) -> SpectralBasis:
        """All singular vectors, target by target."""
        return SpectralBasis(self.weight_of, self.shape, self._cache_dir)

    def _other(
        self, what: str, rank: int, kind: Kind, compute: Callable[[Tensor, Target], Tensor]
    ) -> Basis:
        """A basis that only training uses: in memory, from the cache, or computed now."""
        if (what, rank) not in self._others:
            path = self._cache_dir / f"{what}-{self.shape.digest[:16]}-r{rank}.safetensors"
            self._others[what, rank] = self._stored(path) or self._made(what, path, kind, compute)
        return self._others[what, rank]

    def _stored(self, path: Path) -> Basis | None:
        if not path.exists():
            return None
        try:
            basis = load_basis(path, self.shape)
        except AdapterRejected as error:
            log.warning("computing a basis again: %s is unusable: %s", path, error)
            return None
        whole = set(basis.factors) == set(self.shape.targets())
        return basis if whole and basis.base_digest == self.shape.digest else None

    def _made(
        self, what: str, path: Path, kind: Kind, compute: Callable[[Tensor, Target], Tensor]
    ) -> Basis:
        targets = self.shape.targets()
        factors: dict[Target, Tensor] = {}
        with self._bar(f"{what} singular vectors") as report:
            for done, target in enumerate(targets, 1):
                factors[target] = compute(self.weight_of(target), target)
                report(done, len(targets))
        basis = make_basis(factors, kind=kind, base_digest=self.shape.digest)
        try:
            save_basis(basis, path)
        except OSError as error:  # it costs time at the next start, nothing else
            log.warning("%s singular vectors are not kept for the next start: %s", what, error)
        return basis

    @contextmanager
    def _bar(self, what: str) -> Iterator[Progress]:
        with tqdm(desc=what, unit="linear", disable=not self._progress, leave=False) as bar:

            def report(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            yield report


@torch.no_grad()
def leading_columns(weight: Tensor, target: Target, rank: int) -> Tensor:
    """A randomised SVD's leading left singular vectors: ``(d_out, min(rank, d_out, d_in))``.

    Subspace iteration in float32 on the weight's device, started from what the target's name
    seeds, so that it is the same in every run. Orthonormal to rounding, float32, on the CPU. Costs
    ``2 · ITERATIONS + 2`` products of W with ``rank + OVERSAMPLING`` columns.

    Source: Halko, Martinsson, Tropp, "Finding structure with randomness" (arXiv 0909.4061).
    """
    w = weight.detach().float()
    kept = min(rank, *w.shape)
    wide = min(rank + OVERSAMPLING, *w.shape)
    seed = hashlib.sha256(f"shoal:svd:1:{target.layer}:{target.module}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(seed[:7], "little"))
    drawn = torch.randn((w.shape[1], wide), generator=generator).to(w.device)
    q = torch.linalg.qr(w @ drawn).Q
    for _ in range(ITERATIONS):
        q = torch.linalg.qr(w @ (w.T @ q)).Q
    seen = (w.T @ q).double()
    inner = torch.linalg.eigh(seen.T @ seen).eigenvectors.flip(1)[:, :kept]
    found: Tensor = q.double() @ inner
    return found.float().cpu()
