"""What a training method is: what it puts on a linear, and how what was trained is written.

A **lane** is one adapter among those that are trained side by side on one resident base. Lanes
share the method, the rank and the frozen weights; each has its own seed, data and optimiser state.
A plain run has one. Everything trained has a leading dimension ``lanes``, and rows of a batch are
sorted by lane: ``(lanes·rows, length, …)``, those of lane 0 first. Nothing of one lane reaches
another.

One `Method` is one set of options and holds no tensors; what it makes of a linear, an
`AdaptedLinear`, holds them all. Trained values are float32 whatever the base is. Neither knows of
data, losses or optimisers.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shoal.adapters.spec import Target
from shoal.adapters.training.config import TrainConfig
from shoal.adapters.training.method_options import DEFAULT_LR, MethodName
from shoal.adapters.training.methods.source import Source

# What `write` says of adapters that were trained on the base as it is. Other tools train on what
# is left of it once the adapter's initial value was taken away (PiSSA, MiLoRA).
WHOLE_BASE: Mapping[str, object] = {"base_correction": None}


class AdaptedLinear(nn.Module):
    """A frozen linear and ``lanes`` adapters of one method.

    Sub-classes own the trained parameters. Most say only what is added (`delta`); those that do
    more than add replace `forward`.

    Attributes:
        linear: the base's, frozen.
        lanes: how many adapters.
    """

    def __init__(self, linear: nn.Linear, lanes: int) -> None:
        super().__init__()
        self.linear = linear
        self.lanes = lanes

    def forward(self, x: Tensor) -> Tensor:
        """``(lanes·rows, …, d_in)`` -> ``(lanes·rows, …, d_out)`` in the base's dtype."""
        y0 = F.linear(x, self.linear.weight)
        y = self.adapted(self.by_lane(x), self.by_lane(y0)).view(y0.shape)
        return y if self.linear.bias is None else y + self.linear.bias

    def adapted(self, x: Tensor, y0: Tensor) -> Tensor:
        """The adapted output before the bias.

        Args:
            x: ``(lanes, n, d_in)``.
            y0: ``(lanes, n, d_out)``, the base's output without bias.
        """
        return y0 + self.delta(x, y0)

    def delta(self, x: Tensor, y0: Tensor) -> Tensor:
        """What the adapter adds, ``(lanes, n, d_out)``; arguments as for `adapted`."""
        raise NotImplementedError

    def factors(self) -> dict[str, nn.Parameter]:
        """What is trained: name -> ``(lanes, …)`` float32, in a fixed order."""
        raise NotImplementedError

    def by_lane(self, x: Tensor) -> Tensor:
        """``(lanes·rows, …, d)`` as ``(lanes, n, d)``."""
        return x.reshape(self.lanes, -1, x.shape[-1])

    def values(self, lane: int) -> dict[str, Tensor]:
        """What one lane trained: name -> ``(…)`` float32, copied to the CPU."""
        return {
            name: factor.detach()[lane].to("cpu", copy=True)
            for name, factor in self.factors().items()
        }


@dataclass(frozen=True, slots=True)
class Start:
    """What a method may start from.

    Attributes:
        generators: one a lane, on the CPU, used for one target after the other.
        source: the base's weights and their decompositions.
    """

    generators: Sequence[torch.Generator]
    source: Source

    @property
    def lanes(self) -> int:
        """How many adapters."""
        return len(self.generators)

    def normal(self, *shape: int, std: float) -> Tensor:
        """``(lanes, *shape)`` float32 on the CPU, each lane drawn from its own generator."""
        return torch.stack([torch.randn(shape, generator=g) * std for g in self.generators])

    def kaiming(self, *shape: int) -> Tensor:
        """``(lanes, *shape)``: Kaiming uniform with ``a = √5``, as torch starts a linear."""
        drawn = [torch.empty(shape) for _ in self.generators]
        for lane, generator in zip(drawn, self.generators, strict=True):
            nn.init.kaiming_uniform_(lane, a=5**0.5, generator=generator)
        return torch.stack(drawn)


Adapted = Mapping[Target, AdaptedLinear]


class Method(ABC):
    """One method with its options; sub-classes are frozen dataclasses."""

    name: ClassVar[MethodName]

    @classmethod
    @abstractmethod
    def of(cls, config: TrainConfig) -> Self:
        """The method as the options ask for it."""

    @property
    def default_lr(self) -> float:
        """A step size that learns without diverging."""
        return DEFAULT_LR[self.name]

    @abstractmethod
    def attach(self, linear: nn.Linear, target: Target, start: Start) -> AdaptedLinear:
        """A fresh adapter on a frozen linear.

        Raises:
            OptionRejected: an option does not fit this linear.
        """

    def rates(self) -> Mapping[str, float]:
        """What multiplies the learning rate, per name in ``factors()``; 1 where absent."""
        return {}

    def penalty(self, adapted: Adapted) -> Tensor | None:
        """``(lanes,)`` float32 to add to each lane's loss, or None."""
        return None

    def before_step(self, adapted: Adapted) -> None:  # noqa: B027
        """Called when a step's gradients are complete, before they are clipped or used.

        Runs on the device alone and reads nothing back, so that it can be recorded in a CUDA graph.
        """

    def after_step(  # noqa: B027
        self, adapted: Adapted, step: int, steps: int, active: Tensor | None = None
    ) -> None:
        """Called after each update; the gradients are no more.

        Args:
            adapted: everything that is trained.
            step: updates made so far, this one included.
            steps: updates that the whole run makes.
            active: ``(lanes,)`` bool, which lanes were updated; None: all. Others must stay.
        """

    def state(self, adapted: Adapted) -> dict[str, Tensor]:
        """What a checkpoint must hold besides factors and optimiser.

        The tensors themselves, of shapes that never change: restoring copies into them.
        """
        return {}

    @abstractmethod
    def write(self, directory: Path, adapted: Adapted, lane: int, source: Source) -> None:
        """Write one lane as ``adapter_config.json`` and ``adapter_model.safetensors``."""
