"""MiSS: the input folded with stride r, times the one trained matrix ``D``.

Source: MiSS (arXiv 2409.15371), section 4.2.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shoal.adapters.formats.writing import write_miss
from shoal.adapters.spec import Target
from shoal.adapters.training.config import MethodName, TrainConfig
from shoal.adapters.training.methods.attaching import check_rank
from shoal.adapters.training.methods.contract import (
    WHOLE_BASE,
    Adapted,
    AdaptedLinear,
    Method,
    Start,
)
from shoal.adapters.training.methods.source import Source


class FoldLinear(AdaptedLinear):
    """``D (lanes, r, d_out)``, ``y = y0 + S_r(x) D``."""

    def __init__(self, linear: nn.Linear, rank: int, lanes: int) -> None:
        """Starts at zero."""
        super().__init__(linear, lanes)
        shape = (lanes, rank, linear.out_features)
        self.d = nn.Parameter(torch.zeros(shape, device=linear.weight.device))

    def adapted(self, x: Tensor, y0: Tensor) -> Tensor:
        """``y0 + S_r(x) D``; sums are float32, the product is in the base's dtype."""
        folded = fold(x, self.d.shape[1])
        return torch.baddbmm(y0, folded, self.d.to(y0.dtype))

    def factors(self) -> dict[str, nn.Parameter]:
        """``D``."""
        return {"D": self.d}


def fold(x: Tensor, rank: int) -> Tensor:
    """``S_r(x) (…, r)`` in x's dtype, ``S_r(x)[i]`` the sum of ``x[j]`` over ``j ≡ i (mod r)``."""
    ragged = -x.shape[-1] % rank
    padded = F.pad(x, (0, ragged)) if ragged else x
    blocks = padded.view(*x.shape[:-1], -1, rank)
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    return blocks.sum(dim=-2, dtype=wide).to(x.dtype)


@dataclass(frozen=True, slots=True)
class Miss(Method):
    """MiSS in its efficient form.

    Attributes:
        rank: rows of ``D``.
    """

    name: ClassVar[MethodName] = "miss"
    rank: int

    @classmethod
    def of(cls, config: TrainConfig) -> Self:
        """The rank."""
        return cls(config.rank)

    def attach(self, linear: nn.Linear, target: Target, start: Start) -> AdaptedLinear:
        """``D`` zero."""
        check_rank(self.rank, linear, target)
        return FoldLinear(linear, self.rank, start.lanes)

    def write(self, directory: Path, adapted: Adapted, lane: int, source: Source) -> None:
        """PEFT's layout."""
        write_miss(
            directory,
            {target: linear.values(lane)["D"] for target, linear in adapted.items()},
            rank=self.rank,
            shape=source.shape,
            extra_config=WHOLE_BASE,
        )
