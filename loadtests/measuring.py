"""What benchmarks of the engine alone share: flags, the engine they build, figures made of runs.

Prints progress to stderr only; each benchmark has its own table. Imports torch only when an engine
is built or a step is profiled.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.loadtests.driver import Bench, Case, profiled_output
from shoal.server.model.shapes import SHAPES

if TYPE_CHECKING:
    from shoal.server.offline import OfflineEngine
    from shoal.server.profiling import Cost, Profile

COSTS_SHOWN = 14


def add_engine_arguments(parser: argparse.ArgumentParser, *, model_shape: str) -> None:
    """The flags that say what to build and how often to run; ``model_shape`` is the default."""
    add = parser.add_argument
    add("--model-shape", choices=sorted(SHAPES), default=model_shape, help="shape of the base")
    add("--family", choices=("core", "fold", "lora"), default="core", help="of the adapters")
    add("--rank", type=positive, default=16, help="of the adapters")
    add("--resident", type=count, default=0, help="adapters in the bank; 0: those in use")
    add("--basis-rank", type=positive, default=64, help="of the basis that core adapters share")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run")
    add(
        "--dtype",
        choices=("auto", "float32", "float16", "bfloat16"),
        default="auto",
        help="auto: float32 on a CPU, the shape's 16-bit type on CUDA",
    )
    add("--rounds", type=positive, default=3, help="measured runs of each side, in turns")
    add("--max-num-seqs", type=positive, default=256, help="rows in one step at most")
    add("--max-num-batched-tokens", type=positive, default=8192, help="tokens in one step at most")
    add("--profile", action="store_true", help="also show where decode steps spend their time")
    add("--results", type=Path, metavar="FILE", help="append each measured run here, a JSON line")
    add("--commit", help="what to call the code measured; default: what git says")
    add("--seed", type=int, default=0, help="of weights, adapters and prompts")


def make_bench(
    args: argparse.Namespace, cases: Sequence[Case], *, resident: int, spare: int = 0
) -> Bench:
    """An engine that can run any of the cases, made as the flags say.

    Args:
        resident: adapters in the bank; 0 makes only the base.
        spare: free places for further ones.

    Raises:
        ValueError: it cannot be made; the message says why.
    """
    from shoal.server.offline import OfflineConfig, OfflineEngine

    if args.max_num_batched_tokens < args.max_num_seqs:
        raise ValueError("--max-num-batched-tokens must be at least --max-num-seqs")
    begin = time.perf_counter()
    config = OfflineConfig(
        model_shape=args.model_shape,
        device=args.device,
        dtype=args.dtype,
        family=args.family,
        rank=args.rank,
        resident=resident,
        spare=spare,
        basis_rank=args.basis_rank,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        workloads=tuple(_workload(case, args) for case in cases),
        seed=args.seed,
    )
    engine = OfflineEngine(config)
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in engine.seconds.items())
    say(f"built in {time.perf_counter() - begin:.1f} s on {engine.device_name()} ({parts})")
    return Bench(engine, args.seed)


def warm_up(bench: Bench, case: Case, adapters: int) -> None:
    """See ``Bench.warm_up``; says how long it took."""
    begin = time.perf_counter()
    bench.warm_up(case, adapters)
    say(f"{case}: warm-up with {adapters} adapters in {time.perf_counter() - begin:.1f} s")


def medians(figures: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Field by field over the rounds; the fields that count are the same in each."""
    out: dict[str, Any] = {}
    for name in figures[0]:
        values = [f[name] for f in figures if f[name] is not None]
        middle = statistics.median(values) if values else None
        # What is in the middle of whole numbers that are the same is one.
        out[name] = next((v for v in values if v == middle), None)
        if out[name] is None and middle is not None:
            out[name] = round(middle, 3)
    return out


def bounds(
    engine: "OfflineEngine", figures: dict[str, Any], distinct: int, copy_rate: float
) -> dict[str, Any]:
    """The time that it takes to read what a decode step must read, and how near the step is.

    Args:
        figures: of a run (see ``Outcome.figures``).
        distinct: different adapters in a step.
        copy_rate: bytes per second.
    """
    parts = {
        "weight_bytes": engine.weight_bytes,
        "kv_bytes": figures["decode_positions"] * engine.position_bytes,
        "adapter_bytes": engine.adapter_bytes(distinct),
    }
    bound_ms = sum(parts.values()) / copy_rate * 1e3
    step_ms = figures["step_ms"]
    return {
        **parts,
        "bound_ms": round(bound_ms, 3),
        "of_bound": round(100 * bound_ms / step_ms, 1) if step_ms else None,
    }


def split(found: "Profile", step_ms: float | None) -> dict[str, float]:
    """Device milliseconds by part; ``gaps`` is what is left of a step without the profiler.

    Kernels that ran side by side count in full, so what is left may be nothing.
    """
    parts = {f"{part}_ms": round(ms, 3) for part, ms in found.split.items()}
    if parts and step_ms is not None:
        parts["gaps_ms"] = round(max(0.0, step_ms - sum(found.split.values())), 3)
        parts["launches"] = round(found.launches)
    return parts


def profile_tables(title: str, found: "Profile") -> str:
    """What cost most, for people."""
    lines = [f"{title}: a decode step in the profiler"]
    for heading, costs in (("device kernels", found.kernels), ("CPU, own time", found.ops)):
        if costs:
            lines.append(f"{heading:<58} {'ms':>8} {'calls':>7}")
            lines += [_cost_line(cost) for cost in costs[:COSTS_SHOWN]]
    return "\n".join(lines)


def say(text: str) -> None:
    """Progress, for people."""
    print(text, file=sys.stderr, flush=True)


def refuse(text: str) -> int:
    """Say why it cannot be done; returns the exit status."""
    print(f"error: {text}", file=sys.stderr)
    return 2


def positive(text: str) -> int:
    """A flag's value of at least 1."""
    return _at_least(text, 1)


def count(text: str) -> int:
    """A flag's value of at least 0."""
    return _at_least(text, 0)


def _workload(case: Case, args: argparse.Namespace) -> tuple[int, int]:
    """Sequences, and tokens of each at their longest."""
    seqs, tokens = args.max_num_seqs, args.max_num_batched_tokens
    output = profiled_output(case, seqs, tokens) if args.profile else case.output
    return case.requests, case.input + output


def _cost_line(cost: "Cost") -> str:
    name = cost.name if len(cost.name) <= 56 else cost.name[:27] + ".." + cost.name[-27:]
    return f"  {name:<56} {cost.ms:8.3f} {cost.calls:7.1f}"


def _at_least(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least {least}")
    return value
