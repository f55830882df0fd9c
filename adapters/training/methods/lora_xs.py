"""LoRA-XS: ``ΔW = s·B R Bᵀ W`` with a frozen orthonormal ``B``; only ``R (r, r)`` is trained.

Source: LoRA-XS (arXiv 2405.17604).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from shoal.adapters.formats.writing import write_compact_lora_xs, write_official_lora_xs
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

CORE_STD = 1e-5  # the authors' initial R


class CoreLinear(AdaptedLinear):
    """``R (lanes, r, r)`` between the basis ``B (d_out, r)``: ``y = y0 + s·((y0 B) Rᵀ) Bᵀ``."""

    basis: Tensor

    def __init__(self, linear: nn.Linear, basis: Tensor, core: Tensor, scale: float) -> None:
        """Takes ``B`` and the initial ``R``."""
        super().__init__(linear, len(core))
        self.scale = scale
        self.register_buffer("basis", basis.to(linear.weight), persistent=False)
        self.core = nn.Parameter(core.to(linear.weight.device))

    def delta(self, x: Tensor, y0: Tensor) -> Tensor:
        """``s·((y0 B) Rᵀ) Bᵀ``; the product with R is float32."""
        h = torch.bmm((y0 @ self.basis).to(self.core.dtype), self.core.mT) * self.scale
        return h.to(y0.dtype) @ self.basis.T

    def factors(self) -> dict[str, nn.Parameter]:
        """``R``."""
        return {"R": self.core}


@dataclass(frozen=True, slots=True)
class LoraXs(Method):
    """LoRA-XS on the base's canonical basis.

    Attributes:
        rank: of ``R``.
        scale: ``s``.
        official: write the authors' layout, not the compact one.
    """

    name: ClassVar[MethodName] = "lora-xs"
    rank: int
    scale: float
    official: bool = False

    @classmethod
    def of(cls, config: TrainConfig) -> Self:
        """Rank, scale and layout."""
        return cls(config.rank, config.scale, config.format == "official")

    def attach(self, linear: nn.Linear, target: Target, start: Start) -> AdaptedLinear:
        """``R`` normal, almost zero."""
        basis = start.source.canonical.factors[target]
        check_rank(self.rank, linear, target, basis.shape[1])
        core = start.normal(self.rank, self.rank, std=CORE_STD)
        return CoreLinear(linear, basis[:, : self.rank], core, self.scale)

    def write(self, directory: Path, adapted: Adapted, lane: int, source: Source) -> None:
        """The compact layout, or the authors'."""
        cores = {target: linear.values(lane)["R"] for target, linear in adapted.items()}
        alpha = self.scale * self.rank
        if self.official:
            write_official_lora_xs(
                directory,
                cores,
                alpha=alpha,
                rank=self.rank,
                basis=source.canonical,
                shape=source.shape,
                weight_of=source.weight_of,
                extra_config=WHOLE_BASE,
            )
        else:
            write_compact_lora_xs(
                directory,
                cores,
                alpha=alpha,
                rank=self.rank,
                basis=source.canonical,
                shape=source.shape,
                extra_config=WHOLE_BASE,
            )
