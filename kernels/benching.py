"""How kernels are timed and reported: clock, memory-traffic bound, table, last line JSON.

Owns no op: each ``bench.py`` says what to run. On a GPU a call is captured in a CUDA graph and
replayed behind a write that empties the L2 cache, and once more as a chain of calls in one graph;
on a CPU it is wall clock over small shapes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.kernels.launching import kernel_runs_on
from shoal.kernels.testing import TOLERANCE

FLUSH_BYTES = 256 << 20  # several times the L2 of any current GPU, and long enough to queue behind
CHAIN = 20  # calls of a chain: enough that the graph's own start no longer counts
GPU_ARENA_BYTES = 12 << 30  # 100,000 LoRA-XS adapters of rank 16 on Llama-3.1-8B are 11.5 GB
CPU_ARENA_BYTES = 64 << 20

# Graphs stay alive and share one memory pool: destroying one and going on with cuBLAS in the same
# process has failed.
_GRAPHS: list[torch.cuda.CUDAGraph] = []


class Timing(NamedTuple):
    """Microseconds per call."""

    median: float
    p20: float
    p80: float


@dataclass(frozen=True, slots=True)
class Machine:
    """What the figures were measured on; ``launch_us`` is the time of an almost empty kernel."""

    device: str
    driver: str
    torch: str
    triton: str
    copy_gb_s: float
    launch_us: float


@dataclass(frozen=True, slots=True)
class Record:
    """One measured row.

    Attributes:
        bytes: device memory traffic if every operand moved once.
        bound_us: ``bytes`` at the measured copy rate.
        of_bound: ``bound_us / us`` in percent; 100 would be as fast as a copy.
        chained_us: per call, in a graph of ``CHAIN`` calls that find their operands in the L2
            cache: what the op adds to a captured step. 0 on a CPU.
        baseline: which plain torch the speed-up is over.
    """

    op: str
    case: str
    shapes: dict[str, int]
    dtype: str
    config: str
    us: float
    p20_us: float
    p80_us: float
    bytes: int
    gb_s: float
    bound_us: float
    of_bound: float
    chained_us: float
    baseline: str
    baseline_us: float
    baseline_chained_us: float
    speedup: float


class Bench:
    """A clock for one device, and the adapter arena the benchmarks read from."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32
        self._flush = (
            torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if self.on_gpu else None
        )
        self._pool = torch.cuda.graph_pool_handle() if self.on_gpu else None
        self._arena: Tensor | None = None
        self.machine = self._measure_machine()

    def time(self, call: Callable[[], object], repeats: int = 25) -> Timing:
        """Microseconds of ``call``, which must not synchronise and may run any number of times."""
        if self.on_gpu:
            samples = self._time_graph(call, repeats)
        else:
            call()
            samples = []
            for _ in range(min(repeats, 7)):
                begin = time.perf_counter()
                call()
                samples.append((time.perf_counter() - begin) * 1e6)
        fifths = statistics.quantiles(samples, n=5, method="inclusive")
        return Timing(statistics.median(samples), fifths[0], fifths[3])

    def time_chained(self, call: Callable[[], object], repeats: int = 7) -> float:
        """Median microseconds of ``call`` within a chain of calls in one graph; 0 on a CPU."""
        if not self.on_gpu:
            return 0.0
        samples = self._time_graph(call, repeats, CHAIN)
        return statistics.median(samples) / CHAIN

    def _time_graph(self, call: Callable[[], object], repeats: int, calls: int = 1) -> list[float]:
        assert self._flush is not None
        for _ in range(2):  # the first call compiles
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            for _ in range(calls):
                call()
        _GRAPHS.append(graph)
        graph.replay()
        events = []
        for _ in range(repeats):
            begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            if calls == 1:
                self._flush.zero_()
            begin.record()
            graph.replay()
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) * 1e3 for begin, end in events]

    def _measure_machine(self) -> Machine:
        source = torch.ones(
            (1 << 30) if self.on_gpu else (32 << 20), dtype=torch.int8, device=self.device
        )
        target = torch.empty_like(source)
        copy = self.time(lambda: target.copy_(source))
        small = torch.empty(1, device=self.device)
        launch = self.time(lambda: small.zero_())
        return Machine(
            device=torch.cuda.get_device_name(self.device) if self.on_gpu else "cpu",
            driver=_driver() if self.on_gpu else "none",
            torch=torch.__version__,
            triton=_triton_version(),
            copy_gb_s=round(2 * source.numel() / copy.median / 1e3, 1),
            launch_us=round(launch.median, 2),
        )

    def arena(self) -> Tensor:
        """All adapters: random values of the bench's dtype, made once."""
        if self._arena is None:
            limit = CPU_ARENA_BYTES
            if self.on_gpu:
                limit = min(GPU_ARENA_BYTES, torch.cuda.mem_get_info(self.device)[0] // 2)
            elements = limit // self.dtype.itemsize
            self._arena = torch.empty(elements, dtype=self.dtype, device=self.device)
            step = 1 << 28  # a single fill of 2^32 elements and more is not supported everywhere
            for first in range(0, elements, step):
                self._arena[first : first + step].normal_(std=0.02)
        return self._arena

    def addresses(self, distinct: int, tokens: int, record_elements: int, used: int) -> Tensor:
        """Int64 addresses of ``tokens`` tokens that use ``distinct`` of the resident adapters.

        An adapter takes ``record_elements`` (less where the arena is too small for so many) and
        the op reads ``used`` of them from inside. The adapters are drawn at random from as many
        as fit, at most 100,000; tokens of one adapter are neighbours. Addresses are multiples
        of 16.
        """
        record_elements = min(record_elements, self.arena().numel() // distinct) // 16 * 16
        resident = min(100_000, self.arena().numel() // record_elements)
        assert used <= record_elements, f"{used} elements in a record of {record_elements}"
        generator = torch.Generator().manual_seed(0)
        chosen = torch.randperm(resident, generator=generator)[:distinct].sort().values
        inside = (record_elements - used) // 2 // 16 * 16
        starts = (chosen * record_elements + inside)[torch.randperm(distinct, generator=generator)]
        owner = torch.arange(tokens) * distinct // tokens
        return starts[owner].to(self.device)

    def record(
        self,
        op: str,
        case: str,
        shapes: dict[str, int],
        call: Callable[[], object],
        *,
        bytes_moved: int,
        baseline: tuple[str, Callable[[], object]] | None = None,
        config: object = "default",
    ) -> Record:
        """Time ``call``, and ``baseline`` (its name and call) when given."""
        timing = self.time(call)
        chained = self.time_chained(call)
        base = self.time(baseline[1]).median if baseline else 0.0
        base_chained = self.time_chained(baseline[1]) if baseline else 0.0
        bound = bytes_moved / self.machine.copy_gb_s / 1e3
        return Record(
            op=op,
            case=case,
            shapes=shapes,
            dtype=str(self.dtype).removeprefix("torch."),
            config=str(config),
            us=round(timing.median, 2),
            p20_us=round(timing.p20, 2),
            p80_us=round(timing.p80, 2),
            bytes=bytes_moved,
            gb_s=round(bytes_moved / timing.median / 1e3, 1),
            bound_us=round(bound, 2),
            of_bound=round(100 * bound / timing.median, 1),
            chained_us=round(chained, 2),
            baseline=baseline[0] if baseline else "",
            baseline_us=round(base, 2),
            baseline_chained_us=round(base_chained, 2),
            speedup=round(base / timing.median, 2),
        )


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.split("\n")[0].strip() or "unknown"


def _triton_version() -> str:
    try:
        import triton
    except ModuleNotFoundError:
        return "none"
    return str(triton.__version__)


def format_table(records: Iterable[Record]) -> str:
    """The records as text; a row slower than its baseline is marked."""
    lines = [
        f"{'op':15} {'case':24} {'shapes':38} {'µs':>8} {'p20':>8} {'p80':>8} {'GB/s':>7} "
        f"{'bound µs':>8} {'%bound':>6} {'chained':>8}  speed-up"
    ]
    for row in records:
        shapes = " ".join(f"{name}={size}" for name, size in row.shapes.items())
        gain = f"{row.speedup:.2f}x {row.baseline}" if row.baseline else row.config
        lost = "  (slower)" if row.baseline and row.speedup < 1 else ""
        lines.append(
            f"{row.op:15} {row.case:24} {shapes:38} {row.us:8.1f} {row.p20_us:8.1f} "
            f"{row.p80_us:8.1f} {row.gb_s:7.0f} {row.bound_us:8.2f} {row.of_bound:6.1f} "
            f"{row.chained_us:8.2f}  "
            f"{gain}{lost}"
        )
    return "\n".join(lines)


def format_winners(records: Sequence[Record]) -> str:
    """For each case of a sweep: the fastest configuration, and how the others compare."""
    cases: dict[tuple[str, str, str], list[Record]] = {}
    for row in records:
        cases.setdefault((row.op, row.case, str(row.shapes)), []).append(row)
    lines = ["sweep: fastest configuration of each case"]
    for (op, case, shapes), rows in cases.items():
        ranked = sorted(rows, key=lambda row: row.us)
        lines.append(f"{op} {case} {shapes}")
        lines.extend(
            f"    {row.us:8.2f} µs  {100 * (row.us / ranked[0].us - 1):+6.1f} %  "
            f"chained {row.chained_us:7.2f} µs  {row.config}"
            for row in ranked
        )
    return "\n".join(lines)


class OpBench(NamedTuple):
    """What a ``bench.py`` offers: errors against the reference, rows, and rows of variants."""

    op: str
    check: Callable[[torch.device], dict[torch.dtype, float]]
    measure: Callable[[Bench], list[Record]]
    sweep: Callable[[Bench], list[Record]]


def run(benches: Sequence[OpBench], argv: Sequence[str] | None = None) -> int:
    """Command line of every bench: table, then one line of JSON. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Benchmark adapter kernels.")
    parser.add_argument("--check", action="store_true", help="compare with the reference first")
    parser.add_argument("--sweep", action="store_true", help="also time variants of the launch")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="also write the JSON here")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    began = time.perf_counter()
    errors: dict[str, dict[str, float]] = {}
    if options.check:
        if not kernel_runs_on(device):
            print("check: no kernel runs on a CPU without TRITON_INTERPRET=1, reference only")
        for bench in benches:
            found = bench.check(device)
            errors[bench.op] = {str(dtype): error for dtype, error in found.items()}
            print(f"check {bench.op}: largest error {errors[bench.op]}", flush=True)
            if any(error > TOLERANCE[dtype] for dtype, error in found.items()):
                print(f"FAILED: {bench.op} is further from its reference than the tolerance")
                return 1
    clock = Bench(device)
    print(clock.machine)
    if not clock.on_gpu:
        print("No GPU: wall clock of the torch reference on small shapes, no kernel is timed.")
    rows: list[Record] = []
    variants: list[Record] = []
    for bench in benches:
        if options.sweep and clock.on_gpu:
            found_variants = bench.sweep(clock)
            print(format_winners(found_variants), flush=True)
            variants.extend(found_variants)
        found_rows = bench.measure(clock)
        print(format_table(found_rows), flush=True)
        rows.extend(found_rows)
        print(f"{bench.op}: {time.perf_counter() - began:.0f} s since the start", file=sys.stderr)
    line = json.dumps(
        {
            "machine": asdict(clock.machine),
            "errors": errors,
            "records": [asdict(row) for row in rows],
            "sweep": [asdict(row) for row in variants],
        }
    )
    if options.json is not None:
        options.json.write_text(line + "\n")
    print(line)
    return 0
