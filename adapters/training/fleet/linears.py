"""The linears of a resident base with a bank of adapters each, one a lane."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from shoal.adapters.spec import Target
from shoal.adapters.training.config import TrainConfig
from shoal.adapters.training.errors import OptionRejected
from shoal.adapters.training.fleet.products import Step, core_linear, fold_linear
from shoal.adapters.training.methods.attaching import find_linears
from shoal.adapters.training.methods.contract import AdaptedLinear, Start
from shoal.adapters.training.methods.lora_xs import CORE_STD, CoreLinear
from shoal.adapters.training.methods.miss import FoldLinear
from shoal.adapters.training.methods.source import Source
from shoal.adapters.training.methods.table import method_of


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

    def kept(self, values: Tensor) -> AdaptedLinear:
        """What stands for this linear where an adapter of such values ``(…)`` is written."""
        raise NotImplementedError

    def gradient(self) -> Tensor:
        """Where the gradient goes: the optimiser's, once there is one."""
        if self.bank.grad is None:
            self.bank.grad = torch.zeros_like(self.bank)
        return self.bank.grad


class CoreBank(BankLinear):
    """LoRA-XS: ``R (lanes, r, r)``; see ``methods/lora_xs.py``.

    Attributes:
        sigma: as of the plain linear, on the CPU.
    """

    basis: Tensor
    down: Tensor

    def __init__(self, plain: CoreLinear, lanes: int, step: Step) -> None:
        """Takes the place of what a plain run puts on the linear.

        ``A``, which takes x to what R is multiplied by, is computed of the weight as it is here.
        """
        super().__init__(plain.linear, (lanes, *plain.core.shape[1:]), step)
        weight = plain.linear.weight
        self.scale = plain.scale
        self.sigma = None if plain.sigma is None else plain.sigma.cpu()
        down = (plain.into.float().T @ weight.detach().float()).to(weight.dtype)
        self.register_buffer("basis", plain.basis, persistent=False)
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

    def kept(self, values: Tensor) -> AdaptedLinear:
        """For writing."""
        return _KeptCore(values, self.sigma)


class FoldBank(BankLinear):
    """MiSS: ``D (lanes, r, d_out)``; see ``methods/miss.py``."""

    def __init__(self, plain: FoldLinear, lanes: int, step: Step) -> None:
        """Takes the place of what a plain run puts on the linear."""
        super().__init__(plain.linear, (lanes, *plain.d.shape[1:]), step)

    def product(self, x: Tensor) -> Tensor:
        """``x Wᵀ + S_r(x) D``."""
        return fold_linear(x, self.bank, self.gradient(), self.linear.weight, self.step.owners())

    def factors(self) -> dict[str, nn.Parameter]:
        """``D``."""
        return {"D": self.bank}

    def start(self, start: Start) -> Tensor:
        """Zeros."""
        return torch.zeros((start.lanes, *self.bank.shape[1:]))

    def kept(self, values: Tensor) -> AdaptedLinear:
        """For writing."""
        return _Kept("D", values)


class _Kept(AdaptedLinear):
    """Stands for an adapted linear where only what one lane trained is asked for."""

    def __init__(self, name: str, values: Tensor) -> None:
        nn.Module.__init__(self)
        self._values = {name: values}

    def values(self, lane: int) -> dict[str, Tensor]:
        """As of an adapted linear."""
        assert lane == 0
        return self._values


class _KeptCore(_Kept, CoreLinear):
    """The same of LoRA-XS, which also says what lies between its factors."""

    def __init__(self, values: Tensor, sigma: Tensor | None) -> None:
        _Kept.__init__(self, "R", values)
        self.sigma = sigma


def attach_banks(
    model: nn.Module, config: TrainConfig, source: Source, lanes: int, step: Step
) -> dict[Target, BankLinear]:
    """Freeze the model and put a bank of ``lanes`` adapters on the targeted linears, in place.

    Raises:
        OptionRejected: an option does not fit a linear, or is not for fleets.
        BaseRejected: the model is not a decoder of the expected kind.
    """
    model.requires_grad_(False)
    method = method_of(config)
    start = Start([torch.Generator().manual_seed(0)], source)
    adapted: dict[Target, BankLinear] = {}
    for target, (name, linear) in find_linears(model).items():
        if target.module not in config.targets:
            continue
        plain = method.attach(linear, target, start)
        if isinstance(plain, CoreLinear):
            adapted[target] = CoreBank(plain, lanes, step)
        elif isinstance(plain, FoldLinear) and plain.d.shape[2] == linear.out_features:
            adapted[target] = FoldBank(plain, lanes, step)
        else:
            rule = "with these options it has factors of its own: that is not for fleets"
            raise OptionRejected("method", config.method, rule)
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
