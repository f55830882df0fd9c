"""Reads what steps have computed, without making a GPU wait for the host.

The host launches a step and then looks at the one before it, so that the device always has work.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """A finished step.

    Attributes:
        step: its number, from 1.
        tokens: per lane, what it read.
        seconds: since the end of the step before, or since the clock was started.
        record: ``(4, lanes)`` float32 on the CPU; see ``TrainStep``.
    """

    step: int
    tokens: Sequence[int]
    seconds: float
    record: Tensor


class OutcomeReader:
    """Steps go in as they are launched, and come out as they end."""

    def __init__(self, device: torch.device, lag: int | None = None) -> None:
        """Start the clock.

        Args:
            device: where steps run.
            lag: steps that may be under way while the host goes on; None: 1 on CUDA, else 0.
        """
        self._cuda = device.type == "cuda"
        self._lag = int(self._cuda) if lag is None else lag
        self._waiting: deque[tuple[int, Sequence[int], Tensor, torch.cuda.Event | None]] = deque()
        self.start_clock()

    def start_clock(self) -> None:
        """What has passed so far belongs to no step."""
        self._last = time.perf_counter()

    def push(self, step: int, tokens: Sequence[int], record: Tensor) -> None:
        """Take note of a launched step, whose record may be overwritten by the next."""
        if not self._cuda:
            self._waiting.append((step, tokens, record.clone(), None))
            return
        host = torch.empty(record.shape, dtype=record.dtype, pin_memory=True)
        host.copy_(record, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._waiting.append((step, tokens, host, event))

    def ended(self, *, all_of_them: bool = False) -> Iterator[StepOutcome]:
        """The outcomes that are due; with ``all_of_them`` it waits for every launched step."""
        while len(self._waiting) > (0 if all_of_them else self._lag):
            step, tokens, record, event = self._waiting.popleft()
            if event is not None:
                event.synchronize()
            now = time.perf_counter()
            seconds, self._last = now - self._last, now
            yield StepOutcome(step, tokens, seconds, record)
