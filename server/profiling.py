"""Where a step's time goes, by device kernel and by CPU operation, from torch's profiler.

Kernels are sorted into parts by name, because in a replayed CUDA graph names are all there is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# First match wins; names as of torch 2.11 on CUDA 13, and of our own kernels. What matches nothing
# is "elementwise": norms, rotations, activations, residual sums, and adapters applied inside them.
PARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("adapters", ("core_", "fold_", "grouped_", "shrink_kernel", "expand_kernel")),
    ("sampling", ("sample_", "argmax", "maxops", "max_values", "maxnan", "isfinite")),
    ("attention", ("attention", "fmha", "flash", "softmax")),
    ("copies", ("memcpy", "memset")),
    ("gemm", ("gemm", "gemv", "nvjet", "cutlass", "splitk", "cublas", "xmma")),
)


@dataclass(frozen=True, slots=True)
class Cost:
    """One kernel or operation; per step."""

    name: str
    ms: float
    calls: float


@dataclass(frozen=True, slots=True)
class Profile:
    """What some equal steps did. All figures are per step.

    Attributes:
        kernels: on the device, longest first; empty on a CPU.
        ops: CPU time of operations themselves (the profiler's own cost included), longest first.
        split: device milliseconds by part (``PARTS`` and ``elementwise``); empty on a CPU.
        launches: kernels and copies.
    """

    kernels: tuple[Cost, ...]
    ops: tuple[Cost, ...]
    split: dict[str, float]
    launches: float


def profile_steps(step: Callable[[], object], count: int, device: torch.device) -> Profile:
    """Run ``step`` ``count`` times under the profiler; each call waits for what it launched."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, acc_events=True) as profiler:
        for _ in range(count):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    averages: Sequence[Any] = profiler.key_averages()
    on_device = [e for e in averages if e.device_type.name != "CPU"]
    on_cpu = [e for e in averages if e.device_type.name == "CPU"]
    kernels = _costs(on_device, "self_device_time_total", count)
    split: dict[str, float] = {}
    for cost in kernels:
        split[part_of(cost.name)] = split.get(part_of(cost.name), 0.0) + cost.ms
    return Profile(
        kernels=kernels,
        ops=_costs(on_cpu, "self_cpu_time_total", count),
        split=split,
        launches=sum(cost.calls for cost in kernels),
    )


def part_of(kernel: str) -> str:
    """Which part of a step a kernel belongs to."""
    name = kernel.lower()
    for part, words in PARTS:
        if any(word in name for word in words):
            return part
    return "elementwise"


def _costs(events: Sequence[Any], attribute: str, count: int) -> tuple[Cost, ...]:
    costs = [Cost(e.key, getattr(e, attribute) / 1e3 / count, e.count / count) for e in events]
    return tuple(sorted(costs, key=lambda cost: cost.ms, reverse=True))
