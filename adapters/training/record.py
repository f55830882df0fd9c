"""``training.json``: what was asked for and where, what identifies the run, how it ended."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from shoal.adapters.formats.container import write_atomically
from shoal.adapters.training.config import TrainConfig
from shoal.adapters.training.data import Example
from shoal.adapters.training.environment import describe
from shoal.adapters.training.lanes import Fate, LaneRun

# Options that do not change what is learnt; all others must be the same in a resumed run.
_FREE_OPTIONS = (
    "base",
    "data",
    "out",
    "format",
    "eval_data",
    "eval_every",
    "save_every",
    "device",
    "checkpoint_activations",
    "graphs",
    "resume",
    "overwrite",
)
# What a lane may have of its own; recorded lane by lane.
_LANE_OPTIONS = ("seed", "seeds", "lr")


@dataclass(frozen=True, slots=True)
class TrainResult:
    """How one lane of a run ended.

    Attributes:
        name: of the lane; empty for a plain run.
        steps: updates made, those before a resumption included.
        finished: False when the run was interrupted; ``--resume`` goes on.
        loss: loss of the last step; NaN before the first, in the file null where not finite.
        parameters: number of trained values.
        fate: ``finished``, ``running`` (interrupted), ``patience`` or ``diverged``.
        error: what happened when it diverged; such a lane leaves no adapter.
        best_step: updates before the best evaluation; None without one.
        best_loss: its loss; None without one.
        seconds: spent on steps by the whole run.
        peak_bytes: most memory so far: allocated on the GPU, or resident of the process.
    """

    name: str
    steps: int
    finished: bool
    loss: float
    parameters: int
    fate: Fate
    error: str | None
    best_step: int | None
    best_loss: float | None
    seconds: float
    peak_bytes: int


def result_of(
    lane: LaneRun, *, finished: bool, parameters: int, seconds: float, peak_bytes: int
) -> TrainResult:
    """The lane's end, and what belongs to the whole run."""
    measured = lane.best.step >= 0
    return TrainResult(
        name=lane.lane.name,
        steps=lane.step,
        finished=finished,
        loss=lane.loss,
        parameters=parameters,
        fate=lane.fate,
        error=lane.error,
        best_step=lane.best.step if measured else None,
        best_loss=lane.best.loss if measured else None,
        seconds=round(seconds, 3),
        peak_bytes=peak_bytes,
    )


def fingerprint_of(
    config: TrainConfig,
    base_digest: str,
    lanes: Sequence[LaneRun],
    evaluation: Sequence[Example],
) -> dict[str, object]:
    """What a resumed run must share with this one."""
    options = {
        name: _plain(value)
        for name, value in asdict(config).items()
        if name not in (*_FREE_OPTIONS, *_LANE_OPTIONS)
    }
    digests: dict[int, str] = {}
    for lane in lanes:
        if id(lane.examples) not in digests:
            digests[id(lane.examples)] = _digest(lane.examples)
    own = [
        {
            "name": lane.lane.name,
            "seed": lane.lane.seed,
            "lr": lane.lr,
            "data_digest": digests[id(lane.examples)],
        }
        for lane in lanes
    ]
    # With early stopping, what is measured, and when, decides which values are kept.
    stopping = {"eval_every": config.evaluation_interval, "eval_digest": _digest(evaluation)}
    return {
        **options,
        **(own[0] if len(own) == 1 and not own[0]["name"] else {"lanes": own}),
        **(stopping if config.patience is not None else {}),
        "base_digest": base_digest,
    }


class RunRecord:
    """Writes the ``training.json`` of every lane."""

    def __init__(
        self,
        config: TrainConfig,
        fingerprint: Mapping[str, object],
        parameters: int,
        device: torch.device,
        processes: int,
    ) -> None:
        """Look around; write nothing.

        Args:
            config: what was asked for.
            fingerprint: what identifies the run.
            parameters: trained values of a lane.
            device: where it runs.
            processes: how many train together.
        """
        self._record = {
            "asked": {name: _plain(value) for name, value in asdict(config).items()},
            "run": dict(fingerprint),
            "parameters": parameters,
            "environment": {**describe(device), "processes": processes},
        }

    def write(self, lanes: Sequence[LaneRun], results: Sequence[TrainResult] = ()) -> None:
        """Replace the files; with results once there are some."""
        for index, lane in enumerate(lanes):
            record: dict[str, Any] = {
                **self._record,
                "lane": {"name": lane.lane.name, "seed": lane.lane.seed, "lr": lane.lr},
            }
            if results:
                result = asdict(results[index])
                record["result"] = {name: _plain(value) for name, value in result.items()}
            text = json.dumps(record, indent=2, sort_keys=True, allow_nan=False) + "\n"
            write_atomically(lane.run.options, [text.encode()])


def _digest(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr(example).encode())
    return digest.hexdigest()


def _plain(value: Any) -> object:
    """The value as JSON can say it; what is not a finite number it cannot."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
