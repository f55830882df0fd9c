"""``GemmPlan``: which columns and which library a fused linear's GEMM uses, chosen by measurement.

A GEMM that also returns ``h`` for the adapters is wider than the base's, and a few columns more or
another library may make it faster or slower by a tenth (H100, Llama-3.1-8B: +128 columns cost
gate_up 7 % at 16 rows and nothing at 256; cuBLASLt takes 45 us where cuBLAS takes 53 for down at
128 rows). No rule was found that predicts it, so every shape is timed once, at start.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from shoal.adapters.spec import GROUPS, Group
from shoal.server.model.decoder import Decoder, Linear

Library = Literal["cublas", "cublaslt"]

LIBRARIES: tuple[Library, ...] = ("cublas", "cublaslt")
# Of GEMMs larger than any that was measured.
LARGE: Library = "cublaslt"
# Columns tried beyond those that are needed: up to the next multiples of these.
PADDINGS = (16, 64, 128, 256)
# Modules times columns of the widest step, rounded up to the widest padding.
SPARE_ROWS = 256
# What making ``u`` beside the GEMM saves the kernel behind it, which then need not mix, less what a
# fork and a join cost. In steps of 192 and 256 rows 2 to 3 us were saved.
BESIDE_US = 1.0
LAYERS_TIMED = 8
REPEATS = 9


class Choice(NamedTuple):
    """How to run one GEMM.

    Attributes:
        columns: beyond the base's outputs; 0 with adapters means that ``h`` is made beside it.
        library: which of torch's BLAS backends runs it; None leaves that alone.
    """

    columns: int
    library: Library | None = None


class Shape(NamedTuple):
    """A row of the plan: columns of the joint basis that the step needs (0: none)."""

    group: Group
    rows: int
    core_columns: int


@dataclass(frozen=True, slots=True)
class GemmPlan:
    """Choices by shape; a row count that was not measured takes those of the next larger one.

    Beyond the largest, and in an empty plan, a GEMM is as wide as it needs to be: there arithmetic
    is the bound, and every column costs.
    """

    choices: Mapping[Shape, Choice]
    rows: tuple[int, ...] = ()

    def choose(self, group: Group, rows: int, core_columns: int) -> Choice:
        """How to run ``group``'s GEMM in a step of ``rows`` tokens."""
        bucket = next((r for r in self.rows if r >= rows), 0)
        found = self.choices.get(Shape(group, bucket, core_columns))
        return found or Choice(len(GROUPS[group]) * core_columns, LARGE if self.rows else None)


NO_PLAN = GemmPlan({})


def multiply(x: Tensor, linear: Linear, choice: Choice) -> Tensor:
    """``x (tokens, d_in)`` times the weight and the first ``choice.columns`` of its spare rows."""
    use_library(choice.library)
    return F.linear(x, linear.widened[: linear.weight.shape[0] + choice.columns])


def use_library(library: Library | None) -> None:
    """Let torch's CUDA GEMMs run in ``library`` from now on."""
    if library is not None and _current.get("library") != library:
        torch.backends.cuda.preferred_blas_library(library)
        _current["library"] = library


_current: dict[str, Library] = {}


def candidates(group: Group, core_columns: int) -> tuple[int, ...]:
    """Columns worth trying for a step that needs ``core_columns`` of each module's."""
    if not core_columns:
        return (0,)
    need = len(GROUPS[group]) * core_columns
    return tuple(sorted({-(-need // pad) * pad for pad in PADDINGS} | {need}))


def measure(
    decoder: Decoder,
    rows: Sequence[int],
    classes: Iterable[int],
    *,
    beside: Iterable[Group] = (),
    beside_rows: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> GemmPlan:
    """Time every candidate on the device, in graphs over several layers' weights.

    Args:
        decoder: on a CUDA device, with ``SPARE_ROWS`` spare rows.
        rows: token counts to measure, ascending.
        classes: columns of the joint basis, such as ``(0, 16, 32, 64)``.
        beside: groups whose ``h`` may be made beside the plain GEMM instead of inside a wider one.
        beside_rows: up to this many tokens.
        progress: called with what is done, and all there is to do.

    The figures are a few percent uncertain, so two starts may choose differently where the
    candidates are as good as equal; results then differ by rounding.
    """
    timer = _Timer(decoder)
    choices: dict[Shape, Choice] = {}
    jobs = [(group, count) for group in GROUPS for count in rows]
    classes = tuple(classes)
    for done, (group, count) in enumerate(jobs):
        if progress:
            progress(done, len(jobs))
        times: dict[Choice, float] = {}
        wanted = {width for columns in classes for width in candidates(group, columns)}
        for width in sorted(wanted | {0}):
            for library in LIBRARIES:
                choice = Choice(width, library)
                times[choice] = timer.microseconds(group, count, choice)
        plain = min((c for c in times if c.columns == 0), key=times.__getitem__)
        for columns in classes:
            fitting = candidates(group, columns)
            best = min((c for c in times if c.columns in fitting), key=times.__getitem__)
            if columns and group in beside and count <= beside_rows:
                best = plain if times[plain] - BESIDE_US < times[best] else best
            choices[Shape(group, count, columns)] = best
    if progress:
        progress(len(jobs), len(jobs))
    return GemmPlan(choices, tuple(rows))


# Never destroyed: a process that destroyed a captured graph and went on using cuBLAS has failed.
_kept: list[torch.cuda.CUDAGraph] = []


class _Timer:
    def __init__(self, decoder: Decoder) -> None:
        layers = list(decoder.layers)
        self._layers = layers[:: max(1, len(layers) // LAYERS_TIMED)][:LAYERS_TIMED]
        self._decoder = decoder
        self._pool = torch.cuda.graph_pool_handle()

    def microseconds(self, group: Group, rows: int, choice: Choice) -> float:
        """Median time of one GEMM."""
        linears: list[Linear] = [getattr(layer, group) for layer in self._layers]
        width = linears[0].weight.shape[1]
        x = torch.empty(rows, width, device=self._decoder.device, dtype=self._decoder.dtype)
        x.normal_()
        runs = linears if rows <= 1024 else linears[:2]
        multiply(x, runs[0], choice)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            for linear in runs:
                multiply(x, linear, choice)
        _kept.append(graph)
        graph.replay()
        events = []
        for _ in range(REPEATS):
            begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            begin.record()
            graph.replay()
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize()
        times = [float(begin.elapsed_time(end)) for begin, end in events]
        return statistics.median(times) * 1e3 / len(runs)
