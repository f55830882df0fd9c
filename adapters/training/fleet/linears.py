"""The linears of a resident base with a bank of adapters each, one a lane."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from shoal.adapters.spec import GROUPS, Target
from shoal.adapters.training.config import TrainConfig
from shoal.adapters.training.errors import OptionRejected
from shoal.adapters.training.fleet.products import Frozen, Step, core_linears, fold_linears
from shoal.adapters.training.methods.attaching import find_linears
from shoal.adapters.training.methods.contract import AdaptedLinear, Start
from shoal.adapters.training.methods.lora_xs import CORE_STD, CoreLinear
from shoal.adapters.training.methods.miss import FoldLinear
from shoal.adapters.training.methods.sharing import SharedInput
from shoal.adapters.training.methods.source import Source
from shoal.adapters.training.methods.table import method_of


class Group(SharedInput):
    """Linears of one input, and their banks.

    Attributes:
        step: what the running step is about; one for all groups of a model.
        frozen: of each linear, what it has of the base.
    """

    def __init__(self, frozen: Sequence[Frozen], step: Step) -> None:
        super().__init__()
        self.step = step
        self.frozen = frozen

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained; a lane's values in the order of the linears."""
        raise NotImplementedError

    def gradient(self, index: int) -> Tensor:
        """Of linear ``index``, ``(lanes, …)`` float32."""
        raise NotImplementedError


class CoreGroup(Group):
    """LoRA-XS: ``R (lanes, linears, r, r)``."""

    def __init__(self, plain: Sequence[CoreLinear], lanes: int, step: Step) -> None:
        """Takes the place of what a plain run puts on the linears."""
        factors = [p.frozen_factors() for p in plain]
        frozen = [
            Frozen(p.linear.weight, p.linear.bias, b)
            for p, (_, b) in zip(plain, factors, strict=True)
        ]
        super().__init__(frozen, step)
        self._scale = plain[0].scale
        weight = plain[0].linear.weight
        self._down = torch.cat([a for a, _ in factors])
        shape = (lanes, len(plain), *plain[0].core.shape[1:])
        self.cores = nn.Parameter(torch.zeros(shape, device=weight.device))

    def outputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """``x Wᵀ + s·((x Aᵀ) Rᵀ) Bᵀ``, which is ``y0 + s·((y0 B) Rᵀ) Bᵀ``."""
        rows, grads = self.step.owners(), _gradient(self.cores)
        return core_linears(x, self.cores, grads, self._down, self.frozen, rows, self._scale)

    def parameters(self) -> dict[str, nn.Parameter]:
        """``R``."""
        return {"R": self.cores}

    def gradient(self, index: int) -> Tensor:
        """Of ``R``."""
        return _gradient(self.cores)[:, index]


class FoldGroup(Group):
    """MiSS: of each linear ``D (lanes, r, d_out)``."""

    def __init__(self, plain: Sequence[FoldLinear], lanes: int, step: Step) -> None:
        """Takes the place of what a plain run puts on the linears."""
        super().__init__([Frozen(p.linear.weight, p.linear.bias) for p in plain], step)
        device = plain[0].linear.weight.device
        shapes = [(lanes, *p.d.shape[1:]) for p in plain]
        self.blocks = [nn.Parameter(torch.zeros(shape, device=device)) for shape in shapes]

    def outputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """``x Wᵀ + S_r(x) D``."""
        grads = [_gradient(block) for block in self.blocks]
        return fold_linears(x, self.blocks, grads, self.frozen, self.step.owners())

    def parameters(self) -> dict[str, nn.Parameter]:
        """``D`` of each."""
        return {f"D{index}": block for index, block in enumerate(self.blocks)}

    def gradient(self, index: int) -> Tensor:
        """Of ``D``."""
        return _gradient(self.blocks[index])


class BankLinear(AdaptedLinear):
    """A frozen linear, and what every lane adds to it.

    Unlike what plain runs use, it has any number of rows a lane, and lanes that have none. What is
    trained belongs to its group.

    Attributes:
        shape: of one lane's values.
        group, index: where it belongs.
    """

    def __init__(self, plain: CoreLinear | FoldLinear, lanes: int) -> None:
        """Takes the place of what a plain run puts on the linear."""
        super().__init__(plain.linear, lanes)
        ((_, factor),) = plain.factors().items()
        self.shape: torch.Size = factor.shape[1:]
        self.group: Group | None = None
        self.index = 0
        # On the CPU, where adapters are written.
        self._core = isinstance(plain, CoreLinear)
        sigma = plain.sigma if isinstance(plain, CoreLinear) else None
        self._sigma = None if sigma is None else sigma.cpu()

    def forward(self, x: Tensor) -> Tensor:
        """``(rows, length, d_in)`` -> ``(rows, length, d_out)`` in the base's dtype."""
        assert self.group is not None
        return self.group.output(x, self.index)

    def start(self, start: Start) -> Tensor:
        """What lanes begin with, as in a plain run: ``(lanes of start, …)`` float32 on the CPU."""
        if self._core:
            return start.normal(*self.shape, std=CORE_STD)
        return torch.zeros((start.lanes, *self.shape))

    def gradient(self) -> Tensor:
        """``(lanes, …)`` float32."""
        assert self.group is not None
        return self.group.gradient(self.index)

    def kept(self, values: Tensor) -> AdaptedLinear:
        """What stands for this linear where an adapter of such values ``(…)`` is written."""
        return _KeptCore(values, self._sigma) if self._core else _Kept("D", values)


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
    plain: dict[Target, CoreLinear | FoldLinear] = {}
    for target, (name, linear) in find_linears(model).items():
        if target.module not in config.targets:
            continue
        one = method.attach(linear, target, start)
        narrow = isinstance(one, FoldLinear) and one.d.shape[2] != linear.out_features
        if narrow or not isinstance(one, CoreLinear | FoldLinear):
            rule = "with these options it has factors of its own: that is not for fleets"
            raise OptionRejected("method", config.method, rule)
        plain[target] = one
        adapted[target] = BankLinear(one, lanes)
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, adapted[target])
    for layer in sorted({target.layer for target in plain}):
        for modules in GROUPS.values():
            targets = [Target(layer, module) for module in modules]
            targets = [target for target in targets if target in plain]
            if targets:
                group = _group_of([plain[target] for target in targets], lanes, step)
                for index, target in enumerate(targets):
                    adapted[target].group, adapted[target].index = group, index
    return adapted


def groups_of(banks: Iterable[BankLinear]) -> list[Group]:
    """Each group once, in the order of the linears."""
    groups = (bank.group for bank in banks)
    return list(dict.fromkeys(group for group in groups if group is not None))


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


def _group_of(plain: Sequence[CoreLinear | FoldLinear], lanes: int, step: Step) -> Group:
    cores = [one for one in plain if isinstance(one, CoreLinear)]
    if cores:
        return CoreGroup(cores, lanes, step)
    return FoldGroup([one for one in plain if isinstance(one, FoldLinear)], lanes, step)


def _gradient(parameter: nn.Parameter) -> Tensor:
    """Where its gradient goes: the optimiser's, once there is one."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
