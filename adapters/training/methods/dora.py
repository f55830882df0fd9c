"""DoRA: ``W' = diag(m / ‖W + s·B A‖) (W + s·B A)``: direction and magnitude of each row.

The norms of the rows are constants to the gradient (section 4.3 of the paper), as in PEFT.

Source: DoRA (arXiv 2402.09353).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from shoal.adapters.formats.writing import write_lora
from shoal.adapters.spec import Target
from shoal.adapters.training.method_options import MethodName
from shoal.adapters.training.methods.attaching import check_rank
from shoal.adapters.training.methods.contract import WHOLE_BASE, Adapted, AdaptedLinear, Start
from shoal.adapters.training.methods.lora import Lora, LoraLinear, pairs
from shoal.adapters.training.methods.source import Source


class DoraLinear(LoraLinear):
    """LoRA's factors and the magnitudes ``m (lanes, d_out)``."""

    squares: Tensor

    def __init__(self, linear: nn.Linear, a: Tensor, b: Tensor, scale: float) -> None:
        """Takes A and B; m starts at the norms of W's rows."""
        super().__init__(linear, a, b, scale)
        norms = linear.weight.detach().double().norm(dim=1)
        self.register_buffer("squares", norms.square().float(), persistent=False)
        self.m = nn.Parameter(norms.float().repeat(self.lanes, 1))

    def adapted(self, x: Tensor, y0: Tensor) -> Tensor:
        """``(m / ‖W + s·B A‖) ⊙ (y0 + s·(x Aᵀ) Bᵀ)``."""
        g = self.m / self.row_norms()
        return (LoraLinear.adapted(self, x, y0) * g[:, None]).to(y0.dtype)

    @torch.no_grad()
    def row_norms(self) -> Tensor:
        """``‖(W + s·B A)_o‖``, ``(lanes, d_out)``, without forming the sum.

        ``‖W_o‖² + 2s·((W Aᵀ) ⊙ B)_o + s²·((B A Aᵀ) ⊙ B)_o``, summed over the rank.
        """
        b = self.b
        mixed = 2 * self.scale * (self.linear.weight.to(b.dtype) @ self.a.mT)
        own = self.scale**2 * torch.bmm(b, torch.bmm(self.a, self.a.mT))
        squares: Tensor = self.squares + ((mixed + own) * b).sum(dim=-1)
        return squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()

    def factors(self) -> dict[str, nn.Parameter]:
        """``A``, ``B``, ``m``."""
        return {**super().factors(), "m": self.m}


@dataclass(frozen=True, slots=True)
class Dora(Lora):
    """DoRA over plain LoRA."""

    name: ClassVar[MethodName] = "dora"

    def attach(self, linear: nn.Linear, target: Target, start: Start) -> AdaptedLinear:
        """``A`` Kaiming uniform, ``B`` zero, ``m`` the norms of the rows."""
        check_rank(self.rank, linear, target)
        a = start.kaiming(self.rank, linear.in_features)
        b = torch.zeros((start.lanes, linear.out_features, self.rank))
        return DoraLinear(linear, a, b, self.scale)

    def write(self, directory: Path, adapted: Adapted, lane: int, source: Source) -> None:
        """PEFT's layout, with ``use_dora``."""
        write_lora(
            directory,
            pairs(adapted, lane),
            alpha=self.scale * self.rank,
            rank=self.rank,
            shape=source.shape,
            magnitudes={target: linear.values(lane)["m"] for target, linear in adapted.items()},
            extra_config=WHOLE_BASE,
        )
