"""How a step is run: call by call, or replayed from CUDA graphs.

A small base spends more time launching kernels than computing. A CUDA graph launches a whole
forward and backward pass at once, but only for the shapes and addresses it was recorded with:
inputs are copied into tensors that stay, and there is a graph for each shape, or a little larger.
"""

import functools
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch

from shoal.adapters.training.inputs import Shape, StepInputs
from shoal.adapters.training.step import TrainStep

log = logging.getLogger(__name__)

# Rows are padded to a multiple of this where shapes are recorded.
LENGTH_MULTIPLE = 64
# Shapes recorded at most; others run call by call. A recording takes about as long as ten steps of
# a small base, so a batch is rather padded to a recorded shape that costs up to so many times more.
MAX_GRAPHS = 24
PADDED_COST = 1.25
# Runs before a recording, in which libraries allocate and choose what they will use.
WARM_UPS = 2

Reduce = Callable[[], None]
Replay = Callable[[], None]
# Turns a function of no arguments into one that does the same again, for the same addresses.
Recorder = Callable[[Callable[[], None]], Replay]


class StepRunner(ABC):
    """Runs whole steps."""

    fixed_shapes: bool

    def __init__(self, step: TrainStep, reduce: Reduce | None = None) -> None:
        """Run nothing yet.

        Args:
            step: what is computed.
            reduce: called between the gradients and the update; sums them over processes.
        """
        self.step = step
        self._reduce = reduce

    @abstractmethod
    def run(self, batches: Sequence[StepInputs]) -> None:
        """One step over the batches, on the host. Its outcome is in ``step.record``."""


class EagerRunner(StepRunner):
    """Call by call."""

    fixed_shapes = False

    def run(self, batches: Sequence[StepInputs]) -> None:
        """As the class says."""
        self.step.begin()
        for inputs in batches:
            self.step.accumulate(inputs.to(self.step.device))
        if self._reduce is not None:
            self._reduce()
        self.step.update()


class CapturedRunner(StepRunner):
    """Replays recordings: one for each shape of a batch, and one of the update.

    A recording is preceded by runs that do the work for nothing. They come before the step begins,
    when there are no gradients to spoil, and the update is recorded while no lane is active.
    """

    fixed_shapes = True

    def __init__(self, step: TrainStep, recorder: Recorder, reduce: Reduce | None = None) -> None:
        """Record the update.

        Args:
            step, reduce: see ``StepRunner``.
            recorder: makes recordings; see ``CudaRecorder``.

        Raises:
            RuntimeError: it cannot be recorded; nothing has changed.
        """
        super().__init__(step, reduce)
        self._recorder = recorder
        self._passes: dict[Shape, tuple[StepInputs, Replay]] = {}
        self._most = MAX_GRAPHS
        own = [step.optimizer.active, *step.method.state(step.adapted).values()]
        before = [tensor.clone() for tensor in own]
        step.optimizer.active.zero_()
        step.begin()
        try:
            self._update = recorder(step.update)
        finally:
            for tensor, value in zip(own, before, strict=True):
                tensor.copy_(value)

    def run(self, batches: Sequence[StepInputs]) -> None:
        """As the class says."""
        for inputs in batches:
            if self._fitting(inputs.shape) is None and len(self._passes) < self._most:
                self._record(inputs)
        self.step.begin()
        for inputs in batches:
            self._pass(inputs)
        if self._reduce is not None:
            self._reduce()
        self._update()

    def _pass(self, inputs: StepInputs) -> None:
        shape = self._fitting(inputs.shape)
        if shape is None:
            self.step.accumulate(inputs.to(self.step.device))
            return
        if shape != inputs.shape:
            inputs = inputs.padded(shape.length, shape.capacity)
            inputs = inputs.pinned() if self.step.device.type == "cuda" else inputs
        fixed, replay = self._passes[shape]
        for place, value in zip(fixed.tensors(), inputs.tensors(), strict=True):
            place.copy_(value, non_blocking=True)
        replay()

    def _fitting(self, shape: Shape) -> Shape | None:
        """The cheapest recorded shape that will do, if there is one."""
        if shape in self._passes:
            return shape
        most = PADDED_COST * shape.cost
        found = [known for known in self._passes if known.holds(shape) and known.cost <= most]
        return min(found, key=lambda known: known.cost, default=None)

    def _record(self, inputs: StepInputs) -> None:
        fixed = inputs.to(self.step.device)
        try:
            replay = self._recorder(lambda: self.step.accumulate(fixed))
        except RuntimeError as error:
            # A decoder that looks at its own values (a RoPE that depends on the length) cannot be.
            log.warning("steps run call by call, recording one failed: %s", error)
            self._most = 0
            return
        log.debug("recorded shape=%s", inputs.shape)
        self._passes[inputs.shape] = fixed, replay


class CudaRecorder:
    """Records CUDA graphs that share one stream and one pool of memory, whatever run they are of.

    They never run at the same time, and what outlives a replay (gradients, losses, values) lies
    outside of the pool, so one graph may use the memory of another. Graphs are kept when their run
    is over: going on with cuBLAS after one was destroyed has failed.
    """

    _kept: ClassVar[list[torch.cuda.CUDAGraph]] = []

    def __init__(self, device: torch.device) -> None:
        """Needs a CUDA device."""
        self._stream, self._pool = _stream_and_pool(device)

    def __call__(self, work: Callable[[], None]) -> Replay:
        """Run ``work`` a few times beside the current stream, then record it (without running)."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                work()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads, such as one that pins memory, may go on meanwhile.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            work()
        self._kept.append(graph)
        return graph.replay


@functools.cache
def _stream_and_pool(device: torch.device) -> tuple[Any, Any]:
    return torch.cuda.Stream(device), torch.cuda.graph_pool_handle()  # type: ignore[no-untyped-call]


def runner_for(step: TrainStep, *, captured: bool, reduce: Reduce | None = None) -> StepRunner:
    """The runner for a step: recordings if asked for and on CUDA, else call by call."""
    if captured and step.device.type == "cuda":
        try:
            return CapturedRunner(step, CudaRecorder(step.device), reduce)
        except RuntimeError as error:
            log.warning("steps run call by call, recording an update failed: %s", error)
    return EagerRunner(step, reduce)
