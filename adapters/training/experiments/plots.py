"""The plots of ``RESULTS.md``. No torch."""

from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from shoal.adapters.formats.container import write_atomically
from shoal.adapters.training.experiments.choosing import run_of
from shoal.adapters.training.experiments.claims import average, value_of
from shoal.adapters.training.experiments.log import Line, Log
from shoal.adapters.training.experiments.settings import SWEEP_TASK
from shoal.adapters.training.experiments.statistics import Spread, spread
from shoal.adapters.training.experiments.tables import TABLES


def draw_all(log: Log, folder: Path, *, seeds: Sequence[int], steps: int) -> list[Path]:
    """Draw what there are points for; returns the files written."""
    written = []
    plots: dict[str, Callable[[Any], bool]] = {
        "miss": lambda axes: _curves(log, axes, seeds, steps),
        "lora-xs": lambda axes: _parameters(log, axes, seeds, steps),
        "milora": lambda axes: _forgetting(log, axes, seeds, steps),
        "controlled": lambda axes: _controlled(log, axes),
    }
    for name, draw in plots.items():
        # Imported here: matplotlib takes a second, and the figure needs no window system.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4.2), dpi=110, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        if not draw(axes):
            continue
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        image = BytesIO()
        canvas.print_png(image)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / f"{name}.png", [image.getvalue()])
        written.append(folder / f"{name}.png")
    return written


def _curves(log: Log, axes: Any, seeds: Sequence[int], steps: int) -> bool:
    """Training loss against updates, of the table's methods on the sweep's task."""
    drawn = False
    for setting, _ in TABLES["miss"].rows:
        runs = [run_of(log, setting, SWEEP_TASK, seed, steps) for seed in seeds]
        curves = [run["losses"] for run in runs if run is not None]
        if not curves:
            continue
        count = min(map(len, curves))
        means = [sum(curve[i] for curve in curves) / len(curves) for i in range(count)]
        at = [steps * i / count for i in range(count)]
        axes.plot(at, means, linewidth=1.3, label=setting.label)
        drawn = True
    axes.set_xlabel("update")
    axes.set_ylabel(f"loss on {SWEEP_TASK}, nats per token")
    return drawn


def _parameters(log: Log, axes: Any, seeds: Sequence[int], steps: int) -> bool:
    """Average accuracy against trained values, one line a method."""
    points: dict[str, list[tuple[int, Spread]]] = {}
    for setting, tasks in TABLES["lora-xs"].rows:
        found = _spread(log, setting, tasks, seeds, steps, "accuracy")
        line = _first(log, setting, tasks, seeds, steps)
        if found is not None and line is not None:
            points.setdefault(setting.method, []).append((line["parameters"], found))
    for method, own in points.items():
        own.sort(key=lambda point: point[0])
        axes.errorbar(
            [values for values, _ in own],
            [100 * found.mean for _, found in own],
            [100 * found.sd for _, found in own],
            fmt="o-",
            capsize=3,
            label=method,
        )
    axes.set_xscale("log")
    axes.set_xlabel("trained values")
    axes.set_ylabel("accuracy, average over tasks, %")
    return bool(points)


def _forgetting(log: Log, axes: Any, seeds: Sequence[int], steps: int) -> bool:
    """Forgetting against accuracy; up and left is better."""
    drawn = False
    for name in ("milora", "milora-sets"):
        for setting, tasks in TABLES[name].rows:
            x = _spread(log, setting, tasks, seeds, steps, "forgetting_loss")
            y = _spread(log, setting, tasks, seeds, steps, "accuracy")
            if x is None or y is None:
                continue
            axes.errorbar(
                x.mean, 100 * y.mean, 100 * y.sd, x.sd, fmt="o", capsize=3, label=setting.label
            )
            drawn = True
    axes.set_xlabel("forgetting, nats")
    axes.set_ylabel("accuracy, average over tasks, %")
    return drawn


def _controlled(log: Log, axes: Any) -> bool:
    """Validation loss against epochs, mean over seeds."""
    found: dict[str, list[Line]] = {}
    for line in log.by_id("controlled").values():
        if line["reading"] != "shared x":
            continue
        found.setdefault(line["method"], []).append(line)
    for method, runs in found.items():
        means = [
            sum(values) / len(runs) for values in zip(*(r["losses"] for r in runs), strict=True)
        ]
        axes.plot([10 * i for i in range(len(means))], means, "o-", markersize=3, label=method)
    axes.set_xlabel("epoch")
    axes.set_ylabel("validation loss")
    return bool(found)


def _spread(
    log: Log, setting: Any, tasks: Sequence[str], seeds: Sequence[int], steps: int, metric: str
) -> Spread | None:
    whole = [
        seed
        for seed in seeds
        if all(value_of(log, setting, task, seed, steps, metric) is not None for task in tasks)
    ]
    if not whole:
        return None
    return spread([average(log, setting, tasks, seed, steps, metric) for seed in whole])


def _first(
    log: Log, setting: Any, tasks: Sequence[str], seeds: Sequence[int], steps: int
) -> Line | None:
    lines = (run_of(log, setting, task, seed, steps) for task in tasks for seed in seeds)
    return next((line for line in lines if line is not None), None)
