"""``FleetStep``: what one step of a fleet computes, for every tenant in it at once.

Everything between the batch and the updated values lies on the device, so that it can run ahead of
the host, and be recorded in a CUDA graph for each shape that occurs.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shoal.adapters.spec import Target
from shoal.adapters.training.fleet.inputs import FleetInputs
from shoal.adapters.training.fleet.linears import BankLinear, groups_of
from shoal.adapters.training.fleet.loss import Head, weighted_nll
from shoal.adapters.training.fleet.products import Step
from shoal.adapters.training.optimizer import LaneAdamW

log = logging.getLogger(__name__)

# Shapes recorded at most; others run call by call. Each costs about a step's time and some memory.
MAX_GRAPHS = 24

# Turns a function of no arguments into one that does the same again, for the same addresses.
Recorder = Callable[[Callable[[], None]], Callable[[], None]]


@dataclass(slots=True)
class Outcome:
    """What the host is told of a step.

    Attributes:
        nll: ``(places,)`` float32.
        norm: ``(bank lanes,)`` float32, norm of each lane's gradient before clipping.
        updated: ``(bank lanes,)`` bool; False for a lane of the step means it was not finite.
    """

    nll: Tensor
    norm: Tensor
    updated: Tensor
    _arrived: torch.cuda.Event | None = None

    def sent(self) -> "Outcome":
        """A copy on the CPU, there once ``wait`` returns. Later steps are not waited for."""
        if self.nll.device.type != "cuda":
            return Outcome(self.nll.clone(), self.norm.clone(), self.updated.clone())
        copy = Outcome(_sent(self.nll), _sent(self.norm), _sent(self.updated))
        copy._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copy._arrived.record()
        return copy

    def wait(self) -> None:
        """Return when the values are there."""
        if self._arrived is not None:
            self._arrived.synchronize()


def _sent(tensor: Tensor) -> Tensor:
    place = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return place.copy_(tensor, non_blocking=True)


@dataclass(slots=True)
class _Recording:
    """A step for inputs of one shape.

    Attributes:
        inputs: where the inputs are to be copied.
        replay: does the forward and backward pass.
        nll: what it fills.
    """

    inputs: FleetInputs
    replay: Callable[[], None]
    nll: list[Tensor] = field(default_factory=list)


class FleetStep:
    """Forward, backward and update.

    Attributes:
        banks: the adapted linears, by target.
        optimizer: values and moments of the whole bank.
        fixed_shapes: whether steps are recorded, and want inputs of few shapes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        banks: Mapping[Target, BankLinear],
        step: Step,
        *,
        weight_decay: float = 0.0,
        clip: float = 1.0,
        recorder: Recorder | None = None,
    ) -> None:
        """Take over the banks.

        Args:
            model: what they were put on.
            banks: all of them.
            step: what they look at to see whose rows there are.
            weight_decay, clip: of the update.
            recorder: makes recordings; None: every step runs call by call.
        """
        self.banks = banks
        self.optimizer = LaneAdamW(
            {
                f"{index}.{name}": parameter
                for index, group in enumerate(groups_of(banks.values()))
                for name, parameter in group.parameters().items()
            },
            weight_decay=weight_decay,
            clip=clip,
        )
        self.fixed_shapes = recorder is not None
        self._decoder = cast(Callable[..., Any], model.get_decoder())
        self._head = Head(model)
        self._step = step
        self._recorder = recorder
        self._recordings: dict[tuple[int, ...], _Recording] = {}
        lanes, device = self.optimizer.lanes, self.optimizer.values.device
        self._healthy = torch.ones(lanes, dtype=torch.bool, device=device)

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return self.optimizer.values.device

    def run(self, inputs: FleetInputs) -> Outcome:
        """One update of the lanes in the step. Does not wait for the device."""
        optimizer = self.optimizer
        recording = self._recording(inputs)
        if recording is None:
            there = inputs.to(self.device)
            nll = self.gradients(there)
        else:
            there = recording.inputs
            for place, value in zip(there.tensors(), inputs.tensors(), strict=True):
                place.copy_(value, non_blocking=True)
            recording.replay()
            nll = recording.nll[-1]
        optimizer.active.copy_(there.active)
        optimizer.lr.copy_(there.lr)
        optimizer.step(self._healthy)
        return Outcome(nll, optimizer.norm, optimizer.active).sent()

    def gradients(self, inputs: FleetInputs) -> Tensor:
        """Forward and backward: fills the gradients of the lanes in the step.

        Returns:
            ``(places,)`` float32, the losses of the places.
        """
        self._step.rows = inputs.rows()
        hidden = self._hidden(inputs)
        total, nll = weighted_nll(
            hidden, inputs.positions, inputs.labels, inputs.weights, self._head
        )
        total.backward()  # type: ignore[no-untyped-call]
        broken = torch.zeros(len(self._healthy), device=self.device)
        # Whole numbers: the order in which they are added does not matter.
        broken.index_add_(0, inputs.place_lanes, (~torch.isfinite(nll)).float())
        torch.eq(broken, 0, out=self._healthy)
        return nll

    @torch.no_grad()
    def losses(self, inputs: FleetInputs) -> Tensor:
        """``(places,)`` float32 on the CPU; changes nothing."""
        there = inputs.to(self.device)
        self._step.rows = there.rows()
        hidden = self._hidden(there).index_select(0, there.positions)
        return self._head.nll(hidden, there.labels).cpu()

    def _hidden(self, inputs: FleetInputs) -> Tensor:
        """The decoder's output, ``(tokens, d)``.

        Padding needs no mask: it stands at the right, where a causal model cannot look.
        """
        output = self._decoder(input_ids=inputs.input_ids, use_cache=False)
        hidden: Tensor = output.last_hidden_state
        return hidden.flatten(0, 1)

    def _recording(self, inputs: FleetInputs) -> _Recording | None:
        if self._recorder is None:
            return None
        known = self._recordings.get(inputs.key)
        if known is None and len(self._recordings) < MAX_GRAPHS:
            known = self._record(inputs, self._recorder)
            if known is not None:
                self._recordings[inputs.key] = known
        return known

    def _record(self, inputs: FleetInputs, recorder: Recorder) -> _Recording | None:
        # Copies: what is recorded reads these very tensors.
        fixed = FleetInputs(*(tensor.clone() for tensor in inputs.to(self.device).tensors()))
        nll: list[Tensor] = []
        try:
            # Runs to warm up write gradients of this very step, which the replay writes again.
            replay = recorder(lambda: nll.append(self.gradients(fixed)))
        except RuntimeError as error:  # some decoder's forward cannot be recorded
            log.warning("steps run call by call: recording failed: %s", error)
            self._recorder = None
            return None
        del nll[:-1]
        return _Recording(fixed, replay, nll)
