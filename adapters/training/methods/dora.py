"""DoRA: ``W' = diag(m / ‖W + s·B A‖) (W + s·B A)``: direction and magnitude of each row.

The norms of the rows are constants to the gradient (section 4.3 of the paper), as in PEFT.

Source: DoRA (arXiv 2402.09353).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from shoal.adapters.formats.writing import write_lora
from shoal.adapters.spec import Target
from shoal.adapters.training.method_options import MethodName
from shoal.adapters.training.methods.attaching import check_rank
from shoal.adapters.training.methods.contract import WHOLE_BASE, Adapted, AdaptedLinear, Start
from shoal.adapters.training.methods.lora import Lora, LoraLinear, pairs
from shoal.adapters.training.methods.low_rank import low_rank_linears, padded, padded_rank
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

    @classmethod
    def together(cls, linears: Sequence[Self], x: Tensor) -> tuple[Tensor, ...]:
        """``(m / ‖W + s·B A‖) ⊙ (y0 + s·(x Aᵀ) Bᵀ)`` in the base's dtype, of each."""
        weights = [one.linear.weight for one in linears]
        a, b = [one.a for one in linears], [one.b for one in linears]
        outs = []
        ys = low_rank_linears(x, weights, a, b, linears[0].scale)
        for one, y in zip(linears, ys, strict=True):
            times = one.m / one.row_norms()
            scaled: Tensor = _Scaled.apply(one.by_lane(y), times)  # type: ignore[no-untyped-call]
            out, bias = scaled.view(y.shape), one.linear.bias
            outs.append(out if bias is None else out + bias)
        return tuple(outs)

    @torch.no_grad()
    def row_norms(self) -> Tensor:
        """``‖(W + s·B A)_o‖``, ``(lanes, d_out)``, without forming the sum.

        ``‖W_o‖² + 2s·((W Aᵀ) ⊙ B)_o + s²·((B A Aᵀ) ⊙ B)_o``, summed over the rank. Products of
        ``A`` are in the base's dtype, as those with x are.
        """
        weight, b = self.linear.weight, self.b.mT
        lanes, rank, d_in = self.a.shape
        a = padded(self.a, (lanes, padded_rank(rank, weight.dtype), d_in), weight.dtype)
        own = torch.bmm(a, a.mT)[:, :rank, :rank].to(b.dtype)
        mixed = (a.reshape(-1, d_in) @ weight.T).view(*a.shape[:2], -1)[:, :rank].to(b.dtype)
        mixed.baddbmm_(own, b, beta=2 * self.scale, alpha=self.scale**2)
        squares: Tensor = self.squares + mixed.mul_(b).sum(dim=1)
        return squares.clamp_min_(torch.finfo(squares.dtype).tiny).sqrt_()

    def factors(self) -> dict[str, nn.Parameter]:
        """``A``, ``B``, ``m``."""
        return {**super().factors(), "m": self.m}


class _Scaled(torch.autograd.Function):
    """``y ⊙ g`` of ``y (lanes, n, d)`` and float32 ``g (lanes, d)``, rounded once, to y's dtype."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, g: Tensor) -> Tensor:
        ctx.save_for_backward(y, g)
        return torch.mul(y, g[:, None], out=torch.empty_like(y))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        y, g = ctx.saved_tensors
        dy = torch.mul(grads[0], g[:, None], out=torch.empty_like(y))
        return dy, (grads[0] * y).sum(dim=1, dtype=g.dtype)


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
