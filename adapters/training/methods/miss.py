"""MiSS: one trained matrix ``D`` from zero, repeated over the weight.

The efficient form (MiSS-e, section 4.2 of the paper, and PEFT's ``miss``) shares over inputs:
``y = y0 + S_r(x) D`` with ``D (r, d_out)``; with ``mini_r`` columns, D is repeated over the outputs
as well. The form the paper starts from (section 4.1, equation 3) shares over outputs: ``D
(r, d_in)``, and every output of shard ``i`` adds ``x D[i]ᵀ``.

Source: MiSS (arXiv 2409.15371).
"""

from collections.abc import Sequence
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
from shoal.adapters.training.methods.fold_product import fold, fold_linears
from shoal.adapters.training.methods.low_rank import low_rank_linears, padded_rank
from shoal.adapters.training.methods.sharing import SharedLinear
from shoal.adapters.training.methods.source import Source


class FoldLinear(SharedLinear):
    """``D (lanes, r, d_out)``, or ``(lanes, r, mini_r)``: ``y = y0 + S_r(x) D``."""

    def __init__(self, linear: nn.Linear, rank: int, lanes: int, mini_r: int | None = None) -> None:
        """Starts at zero."""
        super().__init__(linear, lanes)
        shape = (lanes, rank, mini_r or linear.out_features)
        self.d = nn.Parameter(torch.zeros(shape, device=linear.weight.device))

    @classmethod
    def together(cls, linears: Sequence[Self], x: Tensor) -> tuple[Tensor, ...]:
        """``y0 + S_r(x) D`` of each; sums are float32, the product is in the base's dtype."""
        if any(one.d.shape[2] != one.linear.out_features for one in linears):
            return tuple(AdaptedLinear.forward(one, x) for one in linears)
        return fold_linears(
            x,
            [one.linear.weight for one in linears],
            [one.linear.bias for one in linears],
            [one.d for one in linears],
        )

    def adapted(self, x: Tensor, y0: Tensor) -> Tensor:
        """The same where D is narrow, and repeated over the outputs."""
        _, rank, narrow = self.d.shape
        more = padded_rank(rank, x.dtype) - rank
        folded = F.pad(fold(x, rank), (0, more))
        product = torch.bmm(folded, F.pad(self.d.to(y0.dtype), (0, 0, 0, more)))
        tiles = y0.view(*y0.shape[:2], -1, narrow)
        return (tiles + product[:, :, None]).view(y0.shape)

    def factors(self) -> dict[str, nn.Parameter]:
        """``D``."""
        return {"D": self.d}


class ShardLinear(SharedLinear):
    """``D (lanes, r, d_in)``: output ``o`` of shard ``i`` adds ``x D[i]ᵀ``.

    Attributes:
        expand: ``(d_out, r)``, one where an output is of a shard: runs as equal as can be, the
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
        expand = torch.eye(rank).repeat_interleave(sizes, dim=1).T
        self.register_buffer("expand", expand.to(weight), persistent=False)
        shape = (lanes, rank, linear.in_features)
        self.d = nn.Parameter(torch.zeros(shape, device=weight.device))

    @classmethod
    def together(cls, linears: Sequence[Self], x: Tensor) -> tuple[Tensor, ...]:
        """As above, in the base's dtype: LoRA with a ``B`` that is not trained."""
        weights = [one.linear.weight for one in linears]
        biases = [one.linear.bias for one in linears]
        b = [one.expand.expand(one.lanes, -1, -1) for one in linears]
        return low_rank_linears(x, weights, [one.d for one in linears], b, 1.0, biases)

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
