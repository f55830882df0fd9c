"""VeRA: ``ΔW = diag(b) B diag(d) A`` with random ``A`` and ``B`` that all linears share.

Only the vectors are trained. The projections are drawn as PEFT draws them, from a seed of their
own, so that all lanes, and all adapters of that seed, have the same.

Source: VeRA (arXiv 2310.11454); PEFT 0.21, ``tuners/vera``.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shoal.adapters.formats.vera import draw_projections
from shoal.adapters.formats.writing_vera import write_vera
from shoal.adapters.spec import BaseShape, Dims, Target
from shoal.adapters.training.config import TrainConfig
from shoal.adapters.training.method_options import MethodName
from shoal.adapters.training.methods.contract import Adapted, AdaptedLinear, Method, Start
from shoal.adapters.training.methods.low_rank import padded, padded_rank
from shoal.adapters.training.methods.source import Source

D_INITIAL = 0.1


class VeraLinear(AdaptedLinear):
    """``b (lanes, d_out)`` and ``d (lanes, r)``: ``y = y0 + b ⊙ ((d ⊙ (x Aᵀ)) Bᵀ)``."""

    inner: Tensor
    outer: Tensor

    def __init__(
        self, linear: nn.Linear, a: Tensor, b: Tensor, rank: int, d_initial: float, lanes: int
    ) -> None:
        """Takes ``A (k, d_in)`` and ``B (d_out, k)``, on the linear's device and not copied.

        ``k`` is the rank as `padded_rank` fills it up; what is beyond the rank is zero.
        """
        super().__init__(linear, lanes)
        device = linear.weight.device
        self.register_buffer("inner", a, persistent=False)
        self.register_buffer("outer", b, persistent=False)
        self.b = nn.Parameter(torch.zeros((lanes, linear.out_features), device=device))
        self.d = nn.Parameter(torch.full((lanes, rank), d_initial, device=device))

    def adapted(self, x: Tensor, y0: Tensor) -> Tensor:
        """As above, in the base's dtype."""
        d = self.d.to(x.dtype)
        if d.shape[1] < len(self.inner):
            d = F.pad(d, (0, len(self.inner) - d.shape[1]))
        h = F.linear(x, self.inner) * d[:, None]
        return torch.addcmul(y0, F.linear(h, self.outer), self.b.to(x.dtype)[:, None])

    def factors(self) -> dict[str, nn.Parameter]:
        """``b``, ``d``."""
        return {"b": self.b, "d": self.d}


@lru_cache(maxsize=1)
def projections(
    rank: int, widest: Dims, seed: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``A`` and ``B`` of the widest linears, of which each takes a part; see `VeraLinear`."""
    a, b = draw_projections(rank, widest, seed)
    width = padded_rank(rank, dtype)
    a, b = a.to(device, dtype), b.to(device, dtype)
    return padded(a, (width, a.shape[1]), dtype), padded(b, (len(b), width), dtype)


@dataclass(frozen=True, slots=True)
class Vera(Method):
    """VeRA.

    Attributes:
        rank: of the projections; may exceed the linears'.
        modules: those that are adapted, which decide how wide the projections are.
        seed: of the projections.
        d_initial: where ``d`` starts.
    """

    name: ClassVar[MethodName] = "vera"
    rank: int
    modules: tuple[str, ...]
    seed: int = 0
    d_initial: float = D_INITIAL

    @classmethod
    def of(cls, config: TrainConfig) -> Self:
        """Rank, targets, seed and start."""
        return cls(
            config.rank, config.targets, config.projection_seed or 0, config.d_initial or D_INITIAL
        )

    def widest(self, shape: BaseShape) -> Dims:
        """The most outputs and inputs among the adapted linears."""
        dims = [shape.dims[module] for module in self.modules]
        return Dims(max(d.d_out for d in dims), max(d.d_in for d in dims))

    def attach(self, linear: nn.Linear, target: Target, start: Start) -> AdaptedLinear:
        """``b`` zero, ``d`` constant."""
        weight = linear.weight
        widest = self.widest(start.source.shape)
        a, b = projections(self.rank, widest, self.seed, weight.device, weight.dtype)
        own_a, own_b = a[:, : linear.in_features], b[: linear.out_features]
        return VeraLinear(linear, own_a, own_b, self.rank, self.d_initial, start.lanes)

    def write(self, directory: Path, adapted: Adapted, lane: int, source: Source) -> None:
        """PEFT's layout, with the projections."""
        values = {target: linear.values(lane) for target, linear in adapted.items()}
        write_vera(
            directory,
            {target: (own["b"], own["d"]) for target, own in values.items()},
            draw_projections(self.rank, self.widest(source.shape), self.seed),
            seed=self.seed,
            d_initial=self.d_initial,
            shape=source.shape,
        )
