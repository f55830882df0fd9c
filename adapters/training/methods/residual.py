"""PiSSA and MiLoRA: LoRA that starts as a part of the weight, which is taken out of the base.

With ``U_r`` the leading (PiSSA) or trailing (MiLoRA) left singular vectors, ``W_r = U_r U_rᵀ W``
becomes ``s·B A`` at the start, ``A = √(Σ/s) V_rᵀ``, ``B = U_r √(Σ/s)``, and what stays frozen is
``W - W_r``. That residual takes the weight's place: it is the same for all lanes, and the step
costs what LoRA's costs.

Sources: PiSSA (arXiv 2404.02948), MiLoRA (arXiv 2406.09044).
"""

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from shoal.adapters.basis import Basis
from shoal.adapters.formats.writing import write_lora
from shoal.adapters.spec import Target
from shoal.adapters.training.config import TrainConfig
from shoal.adapters.training.method_options import MethodName
from shoal.adapters.training.methods.attaching import check_rank
from shoal.adapters.training.methods.contract import WHOLE_BASE, Adapted, AdaptedLinear, Start
from shoal.adapters.training.methods.lora import Lora, LoraLinear, pairs
from shoal.adapters.training.methods.source import Source


class ResidualLinear(LoraLinear):
    """LoRA on ``W - s·B0 A0``, with ``A0`` and ``B0`` where A and B start.

    Attributes:
        taken: ``A0 (r, d_in)`` and ``B0 (d_out, r)``, float32 on the CPU.
    """

    def __init__(self, linear: nn.Linear, u: Tensor, scale: float, lanes: int) -> None:
        """Takes ``U_r (d_out, r)`` out of the linear, which gets a weight of its own."""
        weight = linear.weight.detach()
        wide_u = u.to(weight.device, torch.float64)
        kept = wide_u.T @ weight.double()  # Σ_r V_rᵀ
        sigma = kept.norm(dim=1)
        # A singular value of zero has no direction: its row is zero, and stays out of the way.
        a = kept / (scale * sigma.clamp_min(1e-30)).sqrt()[:, None]
        b = wide_u * (sigma / scale).sqrt()
        residual = (weight.double() - wide_u @ kept).to(weight.dtype)
        linear.weight = nn.Parameter(residual, requires_grad=False)
        self_a, self_b = a.float(), b.float()
        super().__init__(linear, self_a.repeat(lanes, 1, 1), self_b.repeat(lanes, 1, 1), scale)
        self.taken = (self_a.cpu(), self_b.cpu())


@dataclass(frozen=True, slots=True)
class Residual(Lora):
    """What PiSSA and MiLoRA have in common.

    Attributes:
        converted: write plain LoRA of rank 2r, ``[A; A0]`` and ``[B, -B0]``, for the whole base.
    """

    converted: bool = False

    @abstractmethod
    def vectors(self, source: Source) -> Basis:
        """The left singular vectors to take out; the leading ``rank`` columns count."""

    def attach(self, linear: nn.Linear, target: Target, start: Start) -> AdaptedLinear:
        """All lanes start alike."""
        check_rank(self.rank, linear, target)
        u = self.vectors(start.source).factors[target][:, : self.rank]
        return ResidualLinear(linear, u, self.scale, start.lanes)

    def write(self, directory: Path, adapted: Adapted, lane: int, source: Source) -> None:
        """Rank r and what the base lacks by name, or converted to plain LoRA."""
        own = pairs(adapted, lane)
        if self.converted:
            for target, linear in adapted.items():
                assert isinstance(linear, ResidualLinear)
                (a, b), (a0, b0) = own[target], linear.taken
                own[target] = (torch.cat([a, a0]), torch.cat([b, -b0], dim=1))
            write_lora(
                directory,
                own,
                alpha=2 * self.scale * self.rank,
                rank=2 * self.rank,
                shape=source.shape,
                extra_config=WHOLE_BASE,
            )
            return
        write_lora(
            directory,
            own,
            alpha=self.scale * self.rank,
            rank=self.rank,
            shape=source.shape,
            # What PEFT can repeat by itself it is told in its own words.
            init_lora_weights="pissa" if self.name == "pissa" else True,
            extra_config={"base_correction": {"method": self.name, "r": self.rank}},
        )


@dataclass(frozen=True, slots=True)
class Pissa(Residual):
    """PiSSA.

    Attributes:
        exact: of the SVD; a randomised one leaves another residual, which no tool can compute
            again, so that the adapter is written converted.
    """

    name: ClassVar[MethodName] = "pissa"
    exact: bool = False

    @classmethod
    def of(cls, config: TrainConfig) -> Self:
        """Rank, scale, layout and kind of SVD."""
        exact = config.svd == "exact"
        converted = not exact or config.format == "converted"
        return cls(config.rank, config.scale, converted, exact)

    def vectors(self, source: Source) -> Basis:
        """The leading ones."""
        return source.leading(self.rank) if self.exact else source.randomised(self.rank)


@dataclass(frozen=True, slots=True)
class Milora(Residual):
    """MiLoRA."""

    name: ClassVar[MethodName] = "milora"

    @classmethod
    def of(cls, config: TrainConfig) -> Self:
        """Rank, scale and layout."""
        return cls(config.rank, config.scale, config.format == "converted")

    def vectors(self, source: Source) -> Basis:
        """The trailing ones."""
        return source.trailing(self.rank)
