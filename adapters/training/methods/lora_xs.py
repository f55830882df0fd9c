"""LoRA-XS: ``ΔW = s·B R A`` with frozen ``A`` and ``B``; only ``R (r, r)`` is trained.

``B = U_r`` and ``A = Σ_r V_rᵀ`` of the weight's SVD, so ``A = BᵀW``: B is all that is stored. That
holds too for the trailing singular vectors, and for ``A = V_rᵀ = Σ_r⁻¹BᵀW``; for factors that have
nothing to do with the weight it does not.

``R`` starts normal with standard deviation 1e-5, as the authors start it.

Source: LoRA-XS (arXiv 2405.17604), section 3 and appendices G (what the factors come from), H
(which vectors) and I (without singular values).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shoal.adapters.basis import Basis
from shoal.adapters.formats.writing import (
    write_compact_lora_xs,
    write_explicit_lora_xs,
    write_official_lora_xs,
)
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
from shoal.adapters.training.methods.core_product import core_linears
from shoal.adapters.training.methods.low_rank import padded, padded_rank
from shoal.adapters.training.methods.sharing import SharedLinear
from shoal.adapters.training.methods.source import Source, leading_columns

CORE_STD = 1e-5


class CoreLinear(SharedLinear):
    """``R (lanes, r, r)``, with ``B (d_out, r)`` and ``A = BᵀW``, or ``Σ⁻¹BᵀW``.

    Attributes:
        up, down: ``B`` and ``A`` in the base's dtype, filled up with zeros to `padded_rank`.
        sigma: ``(r,)`` where A lacks it, else None.
    """

    up: Tensor
    down: Tensor

    def __init__(
        self,
        linear: nn.Linear,
        basis: Tensor,
        core: Tensor,
        scale: float,
        *,
        with_sigma: bool = True,
    ) -> None:
        """Takes ``B`` and the initial ``R``."""
        super().__init__(linear, len(core))
        weight = linear.weight.detach()
        self.scale = scale
        a = basis.to(weight.device, torch.float64).T @ weight.double()
        self.sigma: Tensor | None = None
        if not with_sigma:
            self.sigma = a.norm(dim=1)
            a = a / self.sigma[:, None]
        width = padded_rank(len(a), weight.dtype)
        up = padded(basis.to(weight), (len(weight), width), weight.dtype)
        down = padded(a, (width, weight.shape[1]), weight.dtype)
        self.register_buffer("up", up, persistent=False)
        self.register_buffer("down", down, persistent=False)
        self.core = nn.Parameter(core.to(weight.device))

    @classmethod
    def together(cls, linears: Sequence[Self], x: Tensor) -> tuple[Tensor, ...]:
        """``x Wᵀ + s·((x Aᵀ) Rᵀ) Bᵀ`` of each; the product with R is float32."""
        return core_linears(
            x,
            [one.linear.weight for one in linears],
            [one.linear.bias for one in linears],
            [one.down for one in linears],
            [one.up for one in linears],
            [one.core for one in linears],
            linears[0].scale,
        )

    def frozen_factors(self) -> tuple[Tensor, Tensor]:
        """``A (r, d_in)`` and ``B (d_out, r)``."""
        rank = self.core.shape[1]
        return self.down[:rank], self.up[:, :rank]

    def factors(self) -> dict[str, nn.Parameter]:
        """``R``."""
        return {"R": self.core}

    def between(self, lane: int) -> Tensor:
        """What lies between ``B`` and ``BᵀW``: ``R``, or ``R Σ⁻¹``; float32 on the CPU."""
        core = self.values(lane)["R"]
        return core if self.sigma is None else (core.double() / self.sigma.cpu()).float()


class OwnCoreLinear(AdaptedLinear):
    """``R (lanes, r, r)`` between factors that the base's output does not give.

    Attributes:
        a: ``A (lanes, r, d_in)``, frozen; as B it is filled up with zeros to `padded_rank`.
        b: ``B (lanes, d_out, r)``, frozen.
    """

    a: Tensor
    b: Tensor

    def __init__(self, linear: nn.Linear, a: Tensor, b: Tensor, core: Tensor, scale: float) -> None:
        """Takes ``A``, ``B`` and the initial ``R``."""
        super().__init__(linear, len(core))
        self.scale = scale
        weight = linear.weight
        lanes, rank, d_in = a.shape
        width = padded_rank(rank, weight.dtype)
        a = padded(a.to(weight), (lanes, width, d_in), weight.dtype)
        b = padded(b.to(weight), (lanes, len(weight), width), weight.dtype)
        self.register_buffer("a", a, persistent=False)
        self.register_buffer("b", b, persistent=False)
        self.core = nn.Parameter(core.to(weight.device))

    def adapted(self, x: Tensor, y0: Tensor) -> Tensor:
        """``y0 + s·((x Aᵀ) Rᵀ) Bᵀ``; the product with R is float32."""
        more = self.a.shape[1] - self.core.shape[1]
        core = F.pad(self.core, (0, more, 0, more)) if more else self.core
        h = torch.bmm(torch.bmm(x, self.a.mT).to(core.dtype), core.mT)
        return torch.baddbmm(y0, h.to(y0.dtype), self.b.mT, alpha=self.scale)

    def factors(self) -> dict[str, nn.Parameter]:
        """``R``."""
        return {"R": self.core}


@dataclass(frozen=True, slots=True)
class LoraXs(Method):
    """LoRA-XS.

    Attributes:
        rank: of ``R``.
        scale: ``s``.
        official: write the authors' layout also where the compact one could say it.
        init: where A and B come from: ``svd`` of the weight; ``random``, Kaiming uniform;
            ``svd-of-random``, a normal matrix of the weight's size; ``orthonormal``, a random B
            with ``A = BᵀW``. All but the first are each lane's own.
        bottom: the trailing singular vectors instead of the leading.
        with_sigma: whether A has the singular values.
        exact: of the SVD. What is then on the base's canonical basis fits the compact layout.
    """

    name: ClassVar[MethodName] = "lora-xs"
    rank: int
    scale: float
    official: bool = False
    init: str = "svd"
    bottom: bool = False
    with_sigma: bool = True
    exact: bool = True

    @classmethod
    def of(cls, config: TrainConfig) -> Self:
        """What was asked for."""
        return cls(
            config.rank,
            config.scale,
            config.format == "official",
            config.init or "svd",
            config.vectors == "bottom",
            not config.no_sigma,
            config.svd != "randomised",
        )

    @property
    def on_canonical(self) -> bool:
        """Whether B is that of the base's canonical basis."""
        return self.init == "svd" and not self.bottom and self.exact

    def attach(self, linear: nn.Linear, target: Target, start: Start) -> AdaptedLinear:
        """``R`` normal, almost zero."""
        check_rank(self.rank, linear, target)
        a_b = self._own_factors(linear, target, start)
        if a_b is not None:
            core = start.normal(self.rank, self.rank, std=CORE_STD)
            return OwnCoreLinear(linear, *a_b, core, self.scale)
        basis = self._basis(start.source).factors[target]
        check_rank(self.rank, linear, target, basis.shape[1])
        core = start.normal(self.rank, self.rank, std=CORE_STD)
        own = basis[:, : self.rank]
        return CoreLinear(linear, own, core, self.scale, with_sigma=self.with_sigma)

    def _basis(self, source: Source) -> Basis:
        """Where B comes from the weight and ``A = BᵀW`` but for Σ."""
        if self.bottom:
            return source.trailing(self.rank)
        return source.canonical if self.exact else source.randomised(self.rank)

    def _own_factors(
        self, linear: nn.Linear, target: Target, start: Start
    ) -> tuple[Tensor, Tensor] | None:
        """``A`` and ``B`` of every lane where y0 does not give ``x Aᵀ``, else None."""
        if self.init == "svd":
            if not self.bottom or self.with_sigma:
                return None
            # The smallest singular values may be zero: nothing is divided by them.
            svd = start.source.spectral.factors(target)
            a, b = svd.v[:, -self.rank :].T, svd.u[:, -self.rank :]
            return a.expand(start.lanes, *a.shape), b.expand(start.lanes, *b.shape)
        if self.init == "random":
            a = start.kaiming(self.rank, linear.in_features)
            return a, start.kaiming(linear.out_features, self.rank)
        drawn = [self._drawn(linear, target, generator) for generator in start.generators]
        return torch.stack([a for a, _ in drawn]), torch.stack([b for _, b in drawn])

    def _drawn(
        self, linear: nn.Linear, target: Target, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """``A`` and ``B`` of one lane."""
        weight = linear.weight.detach().float().cpu()
        if self.init == "orthonormal":
            b = torch.linalg.qr(torch.randn((len(weight), self.rank), generator=generator)).Q
            return b.T @ weight, b
        matrix = torch.randn(weight.shape, generator=generator) * weight.std()
        b = leading_columns(matrix, target, self.rank)
        a = b.T @ matrix
        return (a if self.with_sigma else a / a.norm(dim=1, keepdim=True)), b

    def write(self, directory: Path, adapted: Adapted, lane: int, source: Source) -> None:
        """The compact layout, or the authors'."""
        alpha = self.scale * self.rank
        cores: dict[Target, Tensor] = {}
        factors: dict[Target, tuple[Tensor, Tensor, Tensor]] = {}
        for target, linear in adapted.items():
            if isinstance(linear, CoreLinear):
                cores[target] = linear.between(lane)
            elif isinstance(linear, OwnCoreLinear):
                a, b = linear.a[lane, : self.rank], linear.b[lane, :, : self.rank]
                core = linear.values(lane)["R"]
                factors[target] = a.float().cpu(), b.float().cpu(), core
        if factors:
            write_explicit_lora_xs(
                directory,
                factors,
                alpha=alpha,
                rank=self.rank,
                shape=source.shape,
                extra_config=WHOLE_BASE,
            )
        elif self.on_canonical and not self.official:
            write_compact_lora_xs(
                directory,
                cores,
                alpha=alpha,
                rank=self.rank,
                basis=source.canonical,
                shape=source.shape,
                extra_config=WHOLE_BASE,
            )
        else:
            write_official_lora_xs(
                directory,
                cores,
                alpha=alpha,
                rank=self.rank,
                basis=self._basis(source),
                shape=source.shape,
                weight_of=source.weight_of,
                extra_config=WHOLE_BASE,
            )
