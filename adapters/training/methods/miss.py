"""MiSS: one trained matrix ``D`` from zero, repeated over the weight.

The efficient form (MiSS-e, section 4.2 of the paper, and PEFT's ``miss``) shares over inputs:
``y = y0 + S_r(x) D`` with ``D (r, d_out)``; with ``mini_r`` columns, D is repeated over the outputs
as well. The form the paper starts from (section 4.1, equation 3) shares over outputs: ``D
(r, d_in)``, and every output of shard ``i`` adds ``x D[i]ᵀ``.

Source: MiSS (arXiv 2409.15371).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shoal.adapters.formats.writing import write_miss
from shoal.adapters.spec import Target
from shoal.adapters.training.config import TrainConfig
from shoal.adapters.training.errors import OptionRejected
from shoal.adapters.training.method_options import MethodName
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
    """``D (lanes, r, d_out)``, or ``(lanes, r, mini_r)``: ``y = y0 + S_r(x) D``."""

    def __init__(self, linear: nn.Linear, rank: int, lanes: int, mini_r: int | None = None) -> None:
        """Starts at zero."""
        super().__init__(linear, lanes)
        shape = (lanes, rank, mini_r or linear.out_features)
        self.d = nn.Parameter(torch.zeros(shape, device=linear.weight.device))

    def adapted(self, x: Tensor, y0: Tensor) -> Tensor:
        """``y0 + S_r(x) D``; sums are float32, the product is in the base's dtype."""
        folded = fold(x, self.d.shape[1])
        d = self.d.to(y0.dtype)
        if d.shape[2] == y0.shape[2]:
            return torch.baddbmm(y0, folded, d)
        tiles = y0.view(*y0.shape[:2], -1, d.shape[2])
        return (tiles + torch.bmm(folded, d)[:, :, None]).view(y0.shape)

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


class ShardLinear(AdaptedLinear):
    """``D (lanes, r, d_in)``: output ``o`` of shard ``i`` adds ``x D[i]ᵀ``.

    Attributes:
        expand: ``(r, d_out)``, one where an output is of a shard: runs as equal as can be, the
            longer ones first. A product with it has a gradient that is summed in a fixed order,
            which that of an index has not on a GPU.
    """

    expand: Tensor

    def __init__(self, linear: nn.Linear, rank: int, lanes: int) -> None:
        """Starts at zero."""
        super().__init__(linear, lanes)
        weight = linear.weight
        size, longer = divmod(linear.out_features, rank)
        sizes = torch.tensor([size + (shard < longer) for shard in range(rank)])
        expand = torch.eye(rank).repeat_interleave(sizes, dim=1)
        self.register_buffer("expand", expand.to(weight), persistent=False)
        shape = (lanes, rank, linear.in_features)
        self.d = nn.Parameter(torch.zeros(shape, device=weight.device))

    def adapted(self, x: Tensor, y0: Tensor) -> Tensor:
        """As above, in the base's dtype."""
        return y0 + torch.bmm(x, self.d.to(x.dtype).mT) @ self.expand

    def factors(self) -> dict[str, nn.Parameter]:
        """``D``."""
        return {"D": self.d}


@dataclass(frozen=True, slots=True)
class Miss(Method):
    """MiSS.

    Attributes:
        rank: rows of ``D``.
        by_output: whether what is shared are outputs.
        mini_r: columns of ``D``, None: one for each output.
    """

    name: ClassVar[MethodName] = "miss"
    rank: int
    by_output: bool = False
    mini_r: int | None = None

    @classmethod
    def of(cls, config: TrainConfig) -> Self:
        """Rank and form."""
        return cls(config.rank, config.shard == "output", config.mini_r)

    def attach(self, linear: nn.Linear, target: Target, start: Start) -> AdaptedLinear:
        """``D`` zero."""
        check_rank(self.rank, linear, target)
        if self.by_output:
            return ShardLinear(linear, self.rank, start.lanes)
        if self.mini_r is not None and linear.out_features % self.mini_r:
            raise OptionRejected(
                "mini-r", self.mini_r, f"must divide the {linear.out_features} outputs of {target}"
            )
        return FoldLinear(linear, self.rank, start.lanes, self.mini_r)

    def write(self, directory: Path, adapted: Adapted, lane: int, source: Source) -> None:
        """PEFT's layout; that of output shards is our own."""
        write_miss(
            directory,
            {target: linear.values(lane)["D"] for target, linear in adapted.items()},
            rank=self.rank,
            by_output=self.by_output,
            mini_r=self.mini_r,
            shape=source.shape,
            extra_config=WHOLE_BASE,
        )
