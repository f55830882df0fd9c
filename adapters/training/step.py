"""``TrainStep``: what one optimiser step computes, free of files, clocks and the host's look.

Everything it reads and writes between the batch and the updated values lies on the device, so that
it can run ahead of the host and be recorded in a CUDA graph.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shoal.adapters.spec import Target
from shoal.adapters.training.inputs import StepInputs
from shoal.adapters.training.loss import LaneLoss
from shoal.adapters.training.methods.contract import AdaptedLinear, Method
from shoal.adapters.training.optimizer import LaneAdamW


class TrainStep:
    """Loss, gradients and update of every lane.

    Attributes:
        optimizer: the values, moments and flags.
        loss: ``(lanes,)`` float32, the loss of the step so far.
        votes: ``(1,)`` float32, whatever processes are to sum besides.
        record: ``(4, lanes)`` float32: the finished step's loss, gradient norm, 1 where the lane
            was updated and else 0, and the votes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        adapted: Mapping[Target, AdaptedLinear],
        method: Method,
        *,
        weight_decay: float = 0.0,
        clip: float | None = 1.0,
        parts: int = 1,
    ) -> None:
        """Take over the adapters' parameters.

        Args:
            model: what the adapters were put on.
            adapted: the adapters.
            method: theirs.
            weight_decay, clip: of the update.
            parts: forward passes per step, over all processes; each adds its share of the penalty.
        """
        names = {
            f"{target}.{name}": (name, factor)
            for target, linear in adapted.items()
            for name, factor in linear.factors().items()
        }
        factor_rates = method.rates()
        self.adapted = adapted
        self.method = method
        self.optimizer = LaneAdamW(
            {full: factor for full, (_, factor) in names.items()},
            weight_decay=weight_decay,
            clip=clip,
            rates={full: factor_rates.get(name, 1.0) for full, (name, _) in names.items()},
        )
        device = self.optimizer.values.device
        self.loss = torch.zeros(self.optimizer.lanes, device=device)
        self.votes = torch.zeros(1, device=device)
        self.record = torch.zeros((4, self.optimizer.lanes), device=device)
        self._lane_loss = LaneLoss(model)
        self._parts = parts

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return self.loss.device

    def begin(self) -> None:
        """Forget the last step's loss and gradients."""
        self.loss.zero_()
        self.optimizer.zero_grad()

    def accumulate(self, inputs: StepInputs) -> None:
        """One forward and backward pass: adds to the loss, without penalty, and the gradients.

        The lanes' losses are added up, so that nothing of one reaches another's gradient.
        """
        loss = self._lane_loss(inputs)
        self.loss += loss.detach()
        penalty = self.method.penalty(self.adapted)
        if penalty is not None:
            loss = loss + penalty / self._parts
        loss.sum().backward()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def update(self) -> None:
        """Clip, update the lanes that are active and finite, and fill ``record``."""
        self.method.before_step(self.adapted)
        self.optimizer.step(torch.isfinite(self.loss))
        self.record[0] = self.loss
        self.record[1] = self.optimizer.norm
        self.record[2] = self.optimizer.active
        self.record[3] = self.votes

    @torch.no_grad()
    def losses(self, inputs: StepInputs) -> Tensor:
        """``(lanes,)``: the loss without penalty; changes nothing."""
        return self._lane_loss(inputs)
