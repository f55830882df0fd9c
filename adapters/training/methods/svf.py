"""SVF: every singular value of a weight times a factor of its own.

``W' = c·U diag(σ ⊙ z) Vᵀ``. As the authors train it, ``z = sigmoid(logits)`` and ``c`` keeps the
sum of the singular values; or ``z`` itself is trained and ``c = 1``, as in the paper's equation.
Since ``U diag(f) Uᵀ W = U diag(f ⊙ σ) Vᵀ``, only U is needed: ``y = y0 + ((y0 U) ⊙ (c z - 1)) Uᵀ``.

Source: Transformer² (arXiv 2501.06252).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from shoal.adapters.formats.writing import write_svf
from shoal.adapters.spec import Target
from shoal.adapters.spectral_basis import Factors
from shoal.adapters.training.config import TrainConfig
from shoal.adapters.training.method_options import MethodName
from shoal.adapters.training.methods.contract import (
    WHOLE_BASE,
    Adapted,
    AdaptedLinear,
    Method,
    Start,
)
from shoal.adapters.training.methods.source import Source


class SvfLinear(AdaptedLinear):
    """``z (lanes, k)``, ``k = min(d_out, d_in)``: the vector, or its logits."""

    u: Tensor
    sigma: Tensor

    def __init__(self, linear: nn.Linear, svd: Factors, logits: bool, lanes: int) -> None:
        """Takes the weight's singular vectors; starts where nothing changes."""
        super().__init__(linear, lanes)
        weight = linear.weight
        self.logits = logits
        self.register_buffer("u", svd.u.to(weight), persistent=False)
        # Relative: the sum of them all is one.
        share = svd.sigma.double() / svd.sigma.double().sum().clamp_min(1e-30)
        self.register_buffer("sigma", share.float().to(weight.device), persistent=False)
        start = torch.full((lanes, len(svd.sigma)), 0.0 if logits else 1.0)
        self.z = nn.Parameter(start.to(weight.device))

    def adapted(self, x: Tensor, y0: Tensor) -> Tensor:
        """As in the module's text; the factors are float32."""
        h = (y0 @ self.u) * (self.times() - 1).to(y0.dtype)[:, None]
        return y0 + h @ self.u.T

    def times(self) -> Tensor:
        """``c z (lanes, k)``: what the singular values are multiplied by."""
        if not self.logits:
            return self.z
        z = torch.sigmoid(self.z)
        return z / (z @ self.sigma)[:, None]

    def factors(self) -> dict[str, nn.Parameter]:
        """``z``."""
        return {"z": self.z}


@dataclass(frozen=True, slots=True)
class Svf(Method):
    """SVF.

    Attributes:
        logits: what is trained.
    """

    name: ClassVar[MethodName] = "svf"
    logits: bool = True

    @classmethod
    def of(cls, config: TrainConfig) -> Self:
        """What is trained."""
        return cls(config.svf_vector != "z")

    def attach(self, linear: nn.Linear, target: Target, start: Start) -> AdaptedLinear:
        """All singular values times one."""
        svd = start.source.spectral.factors(target)
        return SvfLinear(linear, svd, self.logits, start.lanes)

    def write(self, directory: Path, adapted: Adapted, lane: int, source: Source) -> None:
        """Our layout: the authors publish vectors without names."""
        settings = {} if self.logits else {"vector": "z", "renormalise": False}
        write_svf(
            directory,
            {target: linear.values(lane)["z"] for target, linear in adapted.items()},
            basis=source.spectral,
            settings=settings,
            extra_config=WHOLE_BASE,
        )
