"""The linears of a resident base with a bank of adapters each, one a lane."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from shoal.adapters.spec import Target
from shoal.adapters.training.config import TrainConfig
from shoal.adapters.training.fleet.products import Step, core_linear, fold_linear
from shoal.adapters.training.methods.attaching import check_rank, find_linears
from shoal.adapters.training.methods.contract import AdaptedLinear, Start
from shoal.adapters.training.methods.lora_xs import CORE_STD
from shoal.adapters.training.methods.source import Source


class BankLinear(AdaptedLinear):
    """A frozen linear, and what every lane adds to it.

    Unlike what plain runs use, it has any number of rows a lane, and lanes that have none.

    Attributes:
        step: what the running step is about; one for all linears of a model.
    """

    bank: nn.Parameter

    def __init__(self, linear: nn.Linear, shape: tuple[int, ...], step: Step) -> None:
        super().__init__(linear, shape[0])
        self.step = step
        self.bank = nn.Parameter(torch.zeros(shape, device=linear.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """``(rows, length, d_in)`` -> ``(rows, length, d_out)`` in the base's dtype."""
        y = self.product(x)
        return y if self.linear.bias is None else y.add_(self.linear.bias)

    def product(self, x: Tensor) -> Tensor:
        """The adapted output before the bias."""
        raise NotImplementedError

    def start(self, start: Start) -> Tensor:
        """The values that lanes begin with, ``(lanes of start, …)`` float32 on the CPU."""
        raise NotImplementedError

    def gradient(self) -> Tensor:
        """Where the gradient goes: the optimiser's, once there is one."""
        if self.bank.grad is None:
            self.bank.grad = torch.zeros_like(self.bank)
        return self.bank.grad


class CoreBank(BankLinear):
    """LoRA-XS: ``R (lanes, r, r)``; see ``methods/lora_xs.py``."""

    basis: Tensor
    down: Tensor

    def __init__(
        self, linear: nn.Linear, basis: Tensor, lanes: int, scale: float, step: Step
    ) -> None:
        """Takes ``B (d_out, r)``; ``A = Bᵀ W`` is computed of the weight as it is here."""
        rank = basis.shape[1]
        super().__init__(linear, (lanes, rank, rank), step)
        self.scale = scale
        weight = linear.weight
        whole = basis.to(weight.device, torch.float32)
        down = (whole.T @ weight.detach().float()).to(weight.dtype)
        self.register_buffer("basis", whole.to(weight.dtype), persistent=False)
        self.register_buffer("down", down, persistent=False)

    def product(self, x: Tensor) -> Tensor:
        """``x Wᵀ + s·((x Aᵀ) Rᵀ) Bᵀ``, which is ``y0 + s·((y0 B) Rᵀ) Bᵀ``."""
        return core_linear(
            x,
            self.bank,
            self.gradient(),
            self.linear.weight,
            self.basis,
            self.down,
            self.step.owners(),
            self.scale,
        )

    def factors(self) -> dict[str, nn.Parameter]:
        """``R``."""
        return {"R": self.bank}

    def start(self, start: Start) -> Tensor:
        """As a plain run begins."""
        return start.normal(*self.bank.shape[1:], std=CORE_STD)


class FoldBank(BankLinear):
    """MiSS: ``D (lanes, r, d_out)``; see ``methods/miss.py``."""

    def __init__(self, linear: nn.Linear, rank: int, lanes: int, step: Step) -> None:
        super().__init__(linear, (lanes, rank, linear.out_features), step)

    def product(self, x: Tensor) -> Tensor:
        """``x Wᵀ + S_r(x) D``."""
        return fold_linear(x, self.bank, self.gradient(), self.linear.weight, self.step.owners())

    def factors(self) -> dict[str, nn.Parameter]:
        """``D``."""
        return {"D": self.bank}

    def start(self, start: Start) -> Tensor:
        """Zeros."""
        return torch.zeros((start.lanes, *self.bank.shape[1:]))


def attach_banks(
    model: nn.Module, config: TrainConfig, source: Source, lanes: int, step: Step
) -> dict[Target, BankLinear]:
    """Freeze the model and put a bank of ``lanes`` adapters on the targeted linears, in place.

    Raises:
        OptionRejected: the rank does not fit a linear.
        BaseRejected: the model is not a decoder of the expected kind.
    """
    model.requires_grad_(False)
    adapted: dict[Target, BankLinear] = {}
    rank = config.rank
    for target, (name, linear) in find_linears(model).items():
        if target.module not in config.targets:
            continue
        if config.method == "lora-xs":
            basis = source.canonical.factors[target]
            check_rank(rank, linear, target, basis.shape[1])
            adapted[target] = CoreBank(linear, basis[:, :rank], lanes, config.scale, step)
        else:
            check_rank(rank, linear, target)
            adapted[target] = FoldBank(linear, rank, lanes, step)
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, adapted[target])
    return adapted


def values_per_lane(model: nn.Module, config: TrainConfig) -> int:
    """How many values one adapter trains."""
    total = 0
    for target, (_, linear) in find_linears(model).items():
        if target.module in config.targets:
            width = config.rank if config.method == "lora-xs" else linear.out_features
            total += config.rank * width
    return total


def start_values(banks: Sequence[BankLinear], seed: int, source: Source) -> list[Tensor]:
    """What an adapter begins with, per linear without the lane's dimension: as if trained alone."""
    start = Start([torch.Generator().manual_seed(seed)], source)
    return [bank.start(start)[0] for bank in banks]
