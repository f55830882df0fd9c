"""Linears that a decoder gives one input: q, k and v; gate and up.

What is made of their input is then made once, and their gradients by it are added up inside of
products.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Self

from torch import Tensor

from shoal.adapters.spec import GROUPS, Target
from shoal.adapters.training.methods.contract import AdaptedLinear


class SharedInput(ABC):
    """Linears that get one input, one after the other.

    All outputs are made when the first is asked for. A decoder that gives them different inputs
    gets what it asks for too, only slower.
    """

    def __init__(self) -> None:
        self._x: Tensor | None = None
        self._ready: dict[int, Tensor] = {}

    def output(self, x: Tensor, index: int) -> Tensor:
        """Of linear ``index``; ``(rows, length, d_in)`` -> ``(rows, length, d_out)``."""
        if self._x is not x or index not in self._ready:
            self._x, self._ready = x, dict(enumerate(self.outputs(x)))
        y = self._ready.pop(index)
        if not self._ready:
            self._x = None
        return y

    @abstractmethod
    def outputs(self, x: Tensor) -> Sequence[Tensor]:
        """Of all linears."""


class SharedLinear(AdaptedLinear):
    """An adapted linear that is computed together with others of its input, once it knows them."""

    _shared: "tuple[_Together, int] | None" = None

    def forward(self, x: Tensor) -> Tensor:
        """``(lanes·rows, …, d_in)`` -> ``(lanes·rows, …, d_out)`` in the base's dtype."""
        if self._shared is None:
            return self.together([self], x)[0]
        group, index = self._shared
        return group.output(x, index)

    @classmethod
    @abstractmethod
    def together(cls, linears: Sequence[Self], x: Tensor) -> Sequence[Tensor]:
        """The outputs of linears of one method and one set of options."""


class _Together(SharedInput):
    def __init__(self, linears: Sequence[SharedLinear]) -> None:
        super().__init__()
        self._linears = linears

    def outputs(self, x: Tensor) -> Sequence[Tensor]:
        """Of all linears."""
        return self._linears[0].together(self._linears, x)


def share_inputs(adapted: Mapping[Target, AdaptedLinear]) -> None:
    """Let those be computed together that a decoder gives the same input."""
    for layer in sorted({target.layer for target in adapted}):
        for modules in GROUPS.values():
            own = [adapted.get(Target(layer, module)) for module in modules]
            linears = [linear for linear in own if isinstance(linear, SharedLinear)]
            if len(linears) > 1:
                group = _Together(linears)
                for index, linear in enumerate(linears):
                    linear._shared = group, index
