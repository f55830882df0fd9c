"""``Bank``: the fleet's values by slot: a tenant's in, a tenant's out.

The values and moments themselves are the optimiser's rows.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from shoal.adapters.spec import Target
from shoal.adapters.training.config import TrainConfig
from shoal.adapters.training.fleet.linears import BankLinear, start_values
from shoal.adapters.training.methods.contract import AdaptedLinear
from shoal.adapters.training.methods.source import Source
from shoal.adapters.training.methods.table import method_of
from shoal.adapters.training.optimizer import LaneAdamW


class Bank:
    """All slots.

    Attributes:
        best: ``(slots, n)`` float32, the values of each slot's best evaluation; None when nobody
            asks for them.
    """

    def __init__(
        self,
        banks: Mapping[Target, BankLinear],
        optimizer: LaneAdamW,
        source: Source,
        *,
        keep_best: bool,
    ) -> None:
        self._banks = banks
        self._optimizer = optimizer
        self._source = source
        self.best = torch.zeros_like(optimizer.values) if keep_best else None

    @torch.no_grad()
    def begin(self, slot: int, seed: int) -> None:
        """A slot begins as a plain run with this seed does."""
        parts = start_values(list(self._banks.values()), seed, self._source)
        row = torch.cat([part.flatten() for part in parts])
        self._optimizer.values[slot] = row.to(self._optimizer.values.device)
        for state in (self._optimizer.exp_avg, self._optimizer.exp_avg_sq):
            state[slot] = 0.0
        self._optimizer.steps[slot] = 0
        self.keep(slot)  # whatever becomes of its evaluations, nobody else's are its best

    @torch.no_grad()
    def keep(self, slot: int) -> None:
        """Remember a slot's values as its best."""
        if self.best is not None:
            self.best[slot] = self._optimizer.values[slot]

    def take(self, slot: int, *, best: bool) -> Tensor:
        """``(n,)`` float32 on the CPU: a slot's values now, or its best ones."""
        values = self._optimizer.values
        if best and self.best is not None:
            values = self.best
        return values[slot].to("cpu", copy=True)

    def write(self, directory: Path, values: Tensor, config: TrainConfig) -> None:
        """Write an adapter directory of what ``take`` gave. Any thread may."""
        kept: dict[Target, AdaptedLinear] = {}
        start = 0
        for target, bank in self._banks.items():
            size = bank.shape.numel()
            kept[target] = bank.kept(values[start : start + size].view(bank.shape))
            start += size
        method_of(config).write(directory, kept, 0, self._source)

    def state(self, slots: list[int]) -> dict[str, Tensor]:
        """What a checkpoint holds of these slots, one row each, on the CPU."""
        return {name: tensor[slots].cpu() for name, tensor in self._tensors().items()}

    @torch.no_grad()
    def load(self, slots: list[int], state: Mapping[str, Tensor]) -> None:
        """Take what ``state`` gave, into any slots. KeyError when something is missing.

        A fleet that nobody had joined yet who stops early kept no best values: those who were in
        it do not ask for them.
        """
        for name, tensor in self._tensors().items():
            held = state.get("best", state["values"]) if name == "best" else state[name]
            tensor[slots] = held.to(tensor.device)

    def _tensors(self) -> dict[str, Tensor]:
        of = self._optimizer
        tensors = {
            "values": of.values, "exp_avg": of.exp_avg, "exp_avg_sq": of.exp_avg_sq,
            "steps": of.steps,
        }  # fmt: skip
        return tensors if self.best is None else {**tensors, "best": self.best}
