"""What an HTTP process (a *worker*) and the engine's process say to each other.

Both are of one version and one user: messages are pickled, and believed. A worker asks, with
numbers of its own; the engine's process answers, and forgets what a worker asked for when its pipe
ends.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from shoal.server.config import ServeConfig
from shoal.server.engine.request import TokenEvent
from shoal.server.http.jobs import Job
from shoal.server.http.services import TextCodec

Target = Literal["library", "keys", "counts", "server"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """The first message: what a worker's ``Services`` are made of."""

    config: ServeConfig
    tokenizer: TextCodec
    model_name: str
    model_root: str
    max_model_len: int
    vocab_size: int
    started: int
    has_keys: bool


@dataclass(frozen=True, slots=True)
class Start:
    """To the engine: begin a run. Its times are of the clock that a machine's processes share."""

    run: int
    job: Job


@dataclass(frozen=True, slots=True)
class Stop:
    """To the engine: a choice of a run is complete."""

    run: int
    index: int


@dataclass(frozen=True, slots=True)
class Cancel:
    """To the engine: nobody waits for the run any more."""

    run: int


# From the engine: run, choice, event. A plain tuple, since a step brings hundreds.
Event = tuple[int, int, TokenEvent]


@dataclass(frozen=True, slots=True)
class Ended:
    """From the engine: the run has no more events."""

    run: int
    error: Exception | None


@dataclass(frozen=True, slots=True)
class Call:
    """To the engine: call a method, answer with what it returns or raises.

    Attributes:
        owner: whose turn it is among those who wait for a thread.
    """

    call: int
    target: Target
    method: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    owner: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """From the engine."""

    call: int
    value: Any
    error: Exception | None


@dataclass(frozen=True, slots=True)
class End:
    """To the engine: what the call ``begin`` of that number let in has ended."""

    call: int


@dataclass(frozen=True, slots=True)
class Counted:
    """To the engine: add one to a counter of ``Counts``."""

    counter: Literal["error", "upload"]
    label: int | str


@dataclass(frozen=True, slots=True)
class Listening:
    """To the engine: connections are accepted."""


@dataclass(frozen=True, slots=True)
class Drain:
    """From the engine: refuse what is new; say when nothing is in flight."""


@dataclass(frozen=True, slots=True)
class Drained:
    """To the engine: nothing is in flight."""


@dataclass(frozen=True, slots=True)
class Exit:
    """From the engine: end, once the answers that are made have left, or after so many seconds."""

    flush_s: int
