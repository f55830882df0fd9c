"""What a run reports: ``metrics.jsonl``, one line per optimiser step, and ``loss.png``.

It owns these files' form and nothing of the training.
"""

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any

from shoal.adapters.formats.container import write_atomically

log = logging.getLogger(__name__)

_NAMED_LANES = 12  # a legend of more would hide the curves


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One optimiser step of one lane.

    Attributes:
        step: from 1.
        loss: mean negative log-likelihood (nats) per supervised token, before the update; in the
            file null where it is not a finite number.
        lr: learning rate of the update.
        grad_norm: norm of the gradient before clipping; null as the loss.
        tokens_s: tokens of this lane read (padding excluded) per second of the step.
        seconds: from the end of the step before to the end of this one, all lanes together;
            evaluations and checkpoints excluded.
        peak_bytes: most memory so far: allocated on the GPU, or resident of the process.
        error: why the lane ends here; None where it does not.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens_s: float
    seconds: float
    peak_bytes: int
    error: str | None = None


@dataclass(frozen=True, slots=True)
class EvalMetrics:
    """The loss on the evaluation data after ``step`` updates."""

    step: int
    loss: float


class JsonLines:
    """An append-only JSONL log; every line is handed to the operating system at once."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def append(self, record: StepMetrics | EvalMetrics) -> None:
        """Write one line."""
        line = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(record).items()
            if name != "error" or value is not None
        }
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Return when every line is on disk."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> "JsonLines":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


def read_steps(path: Path) -> list[StepMetrics]:
    """The steps of a ``metrics.jsonl``; a last line cut short by a crash is left out."""
    return [StepMetrics(**_numbers(line)) for line in _read_lines(path)]


def read_evals(path: Path) -> list[EvalMetrics]:
    """The evaluations of an ``eval.jsonl``; absent means none."""
    return [EvalMetrics(**_numbers(line)) for line in _read_lines(path)] if path.exists() else []


def keep_until(path: Path, step: int) -> None:
    """Drop the lines after ``step``: those of steps that the checkpoint does not contain."""
    if path.exists():
        kept = [line for line in _read_lines(path) if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_atomically(path, [text.encode()])


def plot_loss(steps: Sequence[StepMetrics], evals: Sequence[EvalMetrics], path: Path) -> None:
    """Draw the loss as a PNG; below it the gradient's norm and the learning rate."""
    figure, (axes, below) = _figure(2)
    numbers = [step.step for step in steps]
    losses = [step.loss for step in steps]
    axes.plot(numbers, losses, color="#9db7d5", linewidth=1, label="loss")
    axes.plot(numbers, _smoothed(losses), color="#1f4e8c", linewidth=2, label="smoothed")
    if evals:
        points = [point.step for point in evals], [point.loss for point in evals]
        axes.plot(*points, "o-", color="#c2571a", linewidth=1, label="evaluation")
    axes.set_ylabel("nats per supervised token")
    axes.set_ylim(bottom=0)
    axes.legend()
    below.plot(numbers, [step.grad_norm for step in steps], color="#5a7d3a", linewidth=1)
    below.set_ylabel("gradient norm", color="#5a7d3a")
    below.set_xlabel("optimiser step")
    rates = below.twinx()
    rates.plot(numbers, [step.lr for step in steps], color="#777777", linewidth=1)
    rates.set_ylabel("learning rate", color="#777777")
    rates.set_ylim(bottom=0)
    _write(figure, path)


def plot_lanes(lanes: Mapping[str, Sequence[StepMetrics]], path: Path) -> None:
    """Draw the smoothed losses of lanes, by name, as a PNG."""
    figure, (axes,) = _figure(1)
    for name, steps in lanes.items():
        smooth = _smoothed([step.loss for step in steps])
        axes.plot([step.step for step in steps], smooth, linewidth=1, label=name)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("nats per supervised token, smoothed")
    axes.set_ylim(bottom=0)
    if len(lanes) <= _NAMED_LANES:
        axes.legend()
    _write(figure, path)


def _figure(rows: int) -> tuple[Any, Sequence[Any]]:
    # Imported here: matplotlib takes a second, and the figure needs no window system or pyplot.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2 + 2 * rows), dpi=120, layout="constrained")
    ratios = [3, 1][:rows]
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    for each in axes:
        each.grid(alpha=0.3)
    return figure, list(axes)


def _write(figure: Any, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    image = BytesIO()
    FigureCanvasAgg(figure).print_png(image)
    write_atomically(path, [image.getvalue()])


def _smoothed(losses: Sequence[float]) -> list[float]:
    """Mean of each step and up to five on either side."""
    windows = (losses[max(0, k - 5) : k + 6] for k in range(len(losses)))
    return [sum(window) / len(window) for window in windows]


def _numbers(line: dict[str, Any]) -> dict[str, Any]:
    return {name: math.nan if value is None else value for name, value in line.items()}


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines up to the first that is not whole.

    A power cut leaves anything at a log's end, behind the last checkpoint; whoever goes on from
    that makes those steps again.
    """
    lines = []
    for number, raw in enumerate(path.read_bytes().rpartition(b"\n")[0].splitlines(), 1):
        try:
            line = json.loads(raw)
        except ValueError:
            line = None
        if not isinstance(line, dict):
            log.warning("what follows is left out: line %d of %s is damaged", number, path)
            break
        lines.append(line)
    return lines
