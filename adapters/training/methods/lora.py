"""LoRA, rsLoRA and LoRA+: ``ΔW = s·B A``, both trained.

They differ in ``s`` (rsLoRA: ``alpha / √r``), and in how fast ``B`` learns (LoRA+).

Sources: LoRA (arXiv 2106.09685), rsLoRA (arXiv 2312.03732), LoRA+ (arXiv 2402.12354).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from shoal.adapters.formats.writing import write_lora
from shoal.adapters.spec import Target
from shoal.adapters.training.config import TrainConfig
from shoal.adapters.training.method_options import MethodName
from shoal.adapters.training.methods.attaching import check_rank
from shoal.adapters.training.methods.contract import (
    WHOLE_BASE,
    Adapted,
    AdaptedLinear,
    Method,
    Start,
)
from shoal.adapters.training.methods.low_rank import low_rank_linears
from shoal.adapters.training.methods.sharing import SharedLinear
from shoal.adapters.training.methods.source import Source

LR_RATIO = 16.0


class LoraLinear(SharedLinear):
    """``A (lanes, r, d_in)`` and ``B (lanes, d_out, r)``, ``y = y0 + s·(x Aᵀ) Bᵀ``."""

    def __init__(self, linear: nn.Linear, a: Tensor, b: Tensor, scale: float) -> None:
        """Takes the initial values; they are copied to the linear's device."""
        super().__init__(linear, len(a))
        device = linear.weight.device
        self.scale = scale
        self.a = nn.Parameter(a.to(device, copy=True))
        self.b = nn.Parameter(b.to(device, copy=True))

    @classmethod
    def together(cls, linears: Sequence[Self], x: Tensor) -> tuple[Tensor, ...]:
        """``y0 + s·(x Aᵀ) Bᵀ`` in the base's dtype, of each."""
        weights, biases = (
            [one.linear.weight for one in linears],
            [one.linear.bias for one in linears],
        )
        a, b = [one.a for one in linears], [one.b for one in linears]
        return low_rank_linears(x, weights, a, b, linears[0].scale, biases)

    def factors(self) -> dict[str, nn.Parameter]:
        """``A``, ``B``."""
        return {"A": self.a, "B": self.b}


@dataclass(frozen=True, slots=True)
class Lora(Method):
    """Plain LoRA.

    Attributes:
        rank: of ``A`` and ``B``.
        scale: ``s``.
    """

    name: ClassVar[MethodName] = "lora"
    rank: int
    scale: float

    @classmethod
    def of(cls, config: TrainConfig) -> Self:
        """Rank and scale."""
        return cls(config.rank, config.scale)

    def attach(self, linear: nn.Linear, target: Target, start: Start) -> AdaptedLinear:
        """``A`` Kaiming uniform, ``B`` zero."""
        check_rank(self.rank, linear, target)
        a = start.kaiming(self.rank, linear.in_features)
        b = torch.zeros((start.lanes, linear.out_features, self.rank))
        return LoraLinear(linear, a, b, self.scale)

    def write(self, directory: Path, adapted: Adapted, lane: int, source: Source) -> None:
        """PEFT's layout."""
        write_lora(
            directory,
            pairs(adapted, lane),
            alpha=self.scale * self.rank,
            rank=self.rank,
            shape=source.shape,
            extra_config=WHOLE_BASE,
        )


def pairs(adapted: Adapted, lane: int) -> dict[Target, tuple[Tensor, Tensor]]:
    """``A`` and ``B`` of one lane, per target."""
    values = {target: linear.values(lane) for target, linear in adapted.items()}
    return {target: (own["A"], own["B"]) for target, own in values.items()}


@dataclass(frozen=True, slots=True)
class RsLora(Lora):
    """LoRA with ``s = alpha / √r``."""

    name: ClassVar[MethodName] = "rslora"

    def write(self, directory: Path, adapted: Adapted, lane: int, source: Source) -> None:
        """PEFT's layout, with ``use_rslora``."""
        write_lora(
            directory,
            pairs(adapted, lane),
            alpha=self.scale * self.rank**0.5,
            rank=self.rank,
            shape=source.shape,
            extra_config={**WHOLE_BASE, "use_rslora": True},
        )


@dataclass(frozen=True, slots=True)
class LoraPlus(Lora):
    """LoRA whose ``B`` has a learning rate of its own.

    Attributes:
        ratio: that rate over A's.
    """

    name: ClassVar[MethodName] = "lora-plus"
    ratio: float = LR_RATIO

    @classmethod
    def of(cls, config: TrainConfig) -> Self:
        """Rank, scale and ratio."""
        return cls(config.rank, config.scale, config.lr_ratio or LR_RATIO)

    def rates(self) -> Mapping[str, float]:
        """``B``'s."""
        return {"B": self.ratio}
