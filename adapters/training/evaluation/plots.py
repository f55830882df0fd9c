"""Plots of an evaluation: accuracy against trained parameters, and forgetting against accuracy."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from shoal.adapters.formats.container import write_atomically
from shoal.adapters.training.evaluation.report import Summary
from shoal.adapters.training.evaluation.runs import AdapterFacts
from shoal.adapters.training.evaluation.source import BASE

COLOURS = ("#1f4e8c", "#c2571a", "#3d7f4b", "#8c2f6b", "#6b6b6b", "#b08b1e", "#2f8a8c", "#a23434")
MARKERS = "osD^vPX*"
# More labels than these would cover the points.
LABELS_MAX = 12


def plot_parameters(
    summaries: Sequence[Summary], facts: Mapping[str, AdapterFacts], path: Path
) -> bool:
    """Mean accuracy against trained parameters; False when there is nothing to draw."""
    points = [
        (facts[s.adapter].parameters, s.accuracy, s.adapter)
        for s in summaries
        if s.adapter in facts and facts[s.adapter].parameters and s.accuracy is not None
    ]
    if not points:
        return False
    canvas, axes = _figure()
    _scatter(axes, points, facts)
    _log_axis(axes)
    axes.set_xlabel("trained parameters")
    axes.set_ylabel("accuracy, mean over tasks")
    base = next((s.accuracy for s in summaries if s.adapter == BASE), None)
    if base is not None:
        axes.axhline(base, color="#6b6b6b", linestyle="--", linewidth=1, label="base")
    _save(canvas, axes, path)
    return True


def plot_forgetting(
    summaries: Sequence[Summary], facts: Mapping[str, AdapterFacts], path: Path
) -> bool:
    """KL from the base on texts against mean accuracy; False when there is nothing to draw."""
    points = [
        (s.accuracy, s.kl, s.adapter)
        for s in summaries
        if s.accuracy is not None and s.kl is not None
    ]
    if not any(adapter != BASE for _, _, adapter in points):
        return False
    canvas, axes = _figure()
    _scatter(axes, points, facts)
    axes.set_xlabel("accuracy, mean over tasks")
    axes.set_ylabel("forgetting: KL from the base, nats a token")
    _save(canvas, axes, path)
    return True


def _figure() -> tuple[Any, Any]:
    # Imported here: matplotlib takes a second, and the figure needs no window system or pyplot.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    return canvas, figure.add_subplot()


def _log_axis(axes: Any) -> None:
    """Parameters from thousands to billions, labelled at 1, 2 and 5."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _scatter(
    axes: Any, points: Sequence[tuple[Any, Any, str]], facts: Mapping[str, AdapterFacts]
) -> None:
    """Points by method, with the adapters' names where there are few."""
    methods: dict[str, list[tuple[Any, Any]]] = {}
    for x, y, adapter in points:
        known = facts.get(adapter)
        method = known.method if known is not None else "base" if adapter == BASE else "adapter"
        methods.setdefault(method, []).append((x, y))
        if len(points) <= LABELS_MAX:
            axes.annotate(
                adapter, (x, y), textcoords="offset points", xytext=(5, 4), fontsize="x-small"
            )
    # The same look in every plot of these adapters.
    known_methods = sorted({known.method for known in facts.values()})
    looks = [*known_methods, *sorted(set(methods) - set(known_methods))]
    for method, own in methods.items():
        xs, ys = zip(*own, strict=True)
        number = looks.index(method)
        axes.plot(
            xs,
            ys,
            linestyle="",
            marker=MARKERS[number % len(MARKERS)],
            color=COLOURS[number % len(COLOURS)],
            label=method,
        )


def _save(canvas: Any, axes: Any, path: Path) -> None:
    axes.margins(0.12)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    image = BytesIO()
    canvas.print_png(image)
    write_atomically(path, [image.getvalue()])
