"""AdaLoRA: ``ΔW = c·P diag(E) Q`` whose rank is moved to where it matters, as training goes on.

P (``B``) and Q (``A``) are kept near orthonormal by a penalty. Every triplet of a column, a value
and a row has an importance, ``|w ∂w|`` smoothed and multiplied by its smoothed uncertainty. Between
``tinit`` and ``steps - tfinal`` updates the budget, a number of triplets over all linears, falls
with the cube of the time left; every ``delta_t`` updates the values of all triplets outside it are
set to zero, whence they may grow again, and after the last allocation for good.

Source: AdaLoRA (arXiv 2303.10512).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from shoal.adapters.formats.writing_adalora import Triplets, write_adalora
from shoal.adapters.spec import Target
from shoal.adapters.training.config import TrainConfig
from shoal.adapters.training.method_options import MethodName, allocation_steps
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

FACTOR_STD = 0.02
DELTA_T = 5
ORTHOGONALITY = 0.5
BETA = 0.85


class AdaloraLinear(SharedLinear):
    """``A (lanes, k, d_in)``, ``E (lanes, k)``, ``B (lanes, d_out, k)``: ``c·((x Aᵀ) ⊙ E) Bᵀ``.

    Attributes:
        importance: smoothed ``|w ∂w|`` of A, E and B, in their shapes, float32.
        uncertainty: smoothed distance from it.
        kept: ``(lanes, k)`` bool, which triplets the last allocation left.
    """

    kept: Tensor

    def __init__(self, linear: nn.Linear, a: Tensor, b: Tensor, scale: float) -> None:
        """Takes A and B; E starts at zero."""
        super().__init__(linear, len(a))
        device = linear.weight.device
        self.scale = scale
        self.a = nn.Parameter(a.to(device))
        self.e = nn.Parameter(torch.zeros(a.shape[:2], device=device))
        self.b = nn.Parameter(b.to(device))
        own = (self.a, self.e, self.b)
        self.importance = [torch.zeros_like(factor.detach()) for factor in own]
        self.uncertainty = [torch.zeros_like(factor.detach()) for factor in own]
        kept = torch.ones(a.shape[:2], dtype=torch.bool, device=device)
        self.register_buffer("kept", kept, persistent=False)

    @classmethod
    def together(cls, linears: Sequence[Self], x: Tensor) -> tuple[Tensor, ...]:
        """``y0 + c·(x (E ⊙ A)ᵀ) Bᵀ`` in the base's dtype, of each."""
        weights, biases = (
            [one.linear.weight for one in linears],
            [one.linear.bias for one in linears],
        )
        a = [one.e[:, :, None] * one.a for one in linears]
        b = [one.b for one in linears]
        return low_rank_linears(x, weights, a, b, linears[0].scale, biases)

    def factors(self) -> dict[str, nn.Parameter]:
        """``A``, ``E``, ``B``."""
        return {"A": self.a, "E": self.e, "B": self.b}

    def scores(self) -> Tensor:
        """How much each triplet matters, ``(lanes, k)``: E's, and the means over row and column."""
        a, e, b = (
            seen * doubt for seen, doubt in zip(self.importance, self.uncertainty, strict=True)
        )
        return e + a.mean(dim=2) + b.mean(dim=1)


@dataclass(frozen=True, slots=True)
class Adalora(Method):
    """AdaLoRA.

    Attributes:
        rank: average rank of a linear after allocation.
        init_rank: of every linear before.
        alpha: ``c = alpha / (init_rank + 1e-5)``, as PEFT has it.
        steps: updates of the whole run.
        tinit, tfinal: updates before the first allocation, and after the last.
        delta_t: updates from one to the next.
        orthogonality: weight of the mean of ``‖PᵀP - I‖_F`` and ``‖QQᵀ - I‖_F`` over the linears.
        beta1, beta2: how much of the old importance, and uncertainty, an update keeps.
    """

    name: ClassVar[MethodName] = "adalora"
    rank: int
    init_rank: int
    alpha: float
    steps: int
    tinit: int
    tfinal: int
    delta_t: int = DELTA_T
    orthogonality: float = ORTHOGONALITY
    beta1: float = BETA
    beta2: float = BETA

    @classmethod
    def of(cls, config: TrainConfig) -> Self:
        """What was asked for, and what follows from rank and steps."""
        init_rank = config.init_rank or math.ceil(1.5 * config.rank)
        tinit, tfinal = allocation_steps(config.steps, config.tinit, config.tfinal)
        weight = config.orthogonality
        return cls(
            config.rank,
            init_rank,
            init_rank if config.alpha is None else config.alpha,
            config.steps,
            tinit,
            tfinal,
            config.delta_t or DELTA_T,
            ORTHOGONALITY if weight is None else weight,
            config.beta1 or BETA,
            config.beta2 or BETA,
        )

    def attach(self, linear: nn.Linear, target: Target, start: Start) -> AdaptedLinear:
        """``A`` and ``B`` normal, ``E`` zero."""
        check_rank(self.init_rank, linear, target, option="init-rank")
        a = start.normal(self.init_rank, linear.in_features, std=FACTOR_STD)
        b = start.normal(linear.out_features, self.init_rank, std=FACTOR_STD)
        return AdaloraLinear(linear, a, b, self.alpha / (self.init_rank + 1e-5))

    def penalty(self, adapted: Adapted) -> Tensor | None:
        """How far P and Q are from orthonormal."""
        if not self.orthogonality:
            return None
        own = _linears(adapted)
        identity = torch.eye(self.init_rank, device=own[0].a.device)
        far = [
            (product - identity).flatten(1).norm(dim=1)
            for each in own
            for product in (torch.bmm(each.a, each.a.mT), torch.bmm(each.b.mT, each.b))
        ]
        return torch.stack(far).mean(dim=0) * self.orthogonality

    @torch.no_grad()
    def before_step(self, adapted: Adapted) -> None:
        """Measure the importance of every value."""
        own = _linears(adapted)
        factors: list[Tensor] = [factor for each in own for factor in each.factors().values()]
        gradients = [factor.grad for factor in factors if factor.grad is not None]
        seen = [old for each in own for old in each.importance]
        doubt = [old for each in own for old in each.uncertainty]
        now = torch._foreach_mul(factors, gradients)
        torch._foreach_abs_(now)
        torch._foreach_lerp_(seen, now, 1 - self.beta1)
        torch._foreach_sub_(now, seen)
        torch._foreach_abs_(now)
        torch._foreach_lerp_(doubt, now, 1 - self.beta2)

    @torch.no_grad()
    def after_step(
        self, adapted: Adapted, step: int, steps: int, active: Tensor | None = None
    ) -> None:
        """Allocate when it is time to; what the last allocation dropped stays zero."""
        own = _linears(adapted)
        last = self.steps - self.tfinal
        if step == last or (self.tinit < step < last and step % self.delta_t == 0):
            for each, mask in zip(own, self._allocation(own, step), strict=True):
                stays = mask if active is None else mask | ~active[:, None]
                if step == last:
                    each.kept.copy_(stays)
                each.e.mul_(stays)
        elif step > last:
            for each in own:
                each.e.mul_(each.kept)

    def budget(self, step: int, linears: int) -> int:
        """Triplets that may stay after ``step`` updates, over so many linears."""
        most, least = self.init_rank * linears, self.rank * linears
        last = self.steps - self.tfinal
        if step <= self.tinit:
            return most
        left = max(0.0, 1 - (step - self.tinit) / (last - self.tinit))
        return int(least + (most - least) * left**3)

    def _allocation(self, own: Sequence[AdaloraLinear], step: int) -> list[Tensor]:
        """Per linear which triplets stay, ``(lanes, k)`` bool; each lane has the whole budget."""
        scores = torch.stack([each.scores() for each in own], dim=1)
        budget = self.budget(step, len(own))
        order = scores.flatten(1).argsort(dim=1, descending=True, stable=True)
        kept = torch.zeros_like(order, dtype=torch.bool)
        kept.scatter_(1, order[:, :budget], True)
        return list(kept.view(scores.shape).unbind(dim=1))

    def state(self, adapted: Adapted) -> dict[str, Tensor]:
        """Importance, uncertainty, and what is kept."""
        tensors: dict[str, Tensor] = {}
        for target, each in zip(adapted, _linears(adapted), strict=True):
            tensors[f"{target}.kept"] = each.kept
            for name, seen, doubt in zip(
                each.factors(), each.importance, each.uncertainty, strict=True
            ):
                tensors[f"{target}.{name}.importance"] = seen
                tensors[f"{target}.{name}.uncertainty"] = doubt
        return tensors

    def write(self, directory: Path, adapted: Adapted, lane: int, source: Source) -> None:
        """PEFT's layout, without the triplets whose value is zero.

        After the last allocation those are what it dropped; and none of a lane whose best values
        are older than that. A fresh adapter is written whole: no tool reads one without ranks.
        """
        values = {target: linear.values(lane) for target, linear in adapted.items()}
        fresh = not any(bool(own["E"].any()) for own in values.values())
        triplets = {
            target: Triplets(own["A"], own["E"], own["B"], (own["E"] != 0) | fresh)
            for target, own in values.items()
        }
        write_adalora(
            directory,
            triplets,
            alpha=self.alpha,
            shape=source.shape,
            extra_config={
                **WHOLE_BASE,
                "init_r": self.init_rank,
                "target_r": self.rank,
                "tinit": self.tinit,
                "tfinal": self.tfinal,
                "deltaT": self.delta_t,
                "beta1": self.beta1,
                "beta2": self.beta2,
                "orth_reg_weight": self.orthogonality,
                "total_step": self.steps,
            },
        )


def _linears(adapted: Adapted) -> list[AdaloraLinear]:
    return [linear for linear in adapted.values() if isinstance(linear, AdaloraLinear)]
