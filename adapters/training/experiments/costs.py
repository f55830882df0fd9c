"""What a method costs: initialisation, a step, and memory; one adapter, everything else equal.

For LoRA-XS, Tables 5 and 6, and MiSS, section 3.2 and Table 8. ``training/bench_step.py`` measures
steps against PEFT's.
"""

import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from shoal.adapters.training.experiments.driver import Clock
from shoal.adapters.training.experiments.place import place
from shoal.adapters.training.experiments.running import Lab, config_of, forget_peak
from shoal.adapters.training.experiments.settings import Group, Setting
from shoal.adapters.training.experiments.tables import (
    DORA,
    LORA_RANK,
    MILORA,
    MISS_RANK,
    PISSA,
    VERA,
    lora,
    lora_xs,
    miss,
    plain,
)
from shoal.adapters.training.lanes import Lane
from shoal.adapters.training.loading import device_of, exact_weights, load_base
from shoal.adapters.training.methods.attaching import shape_of
from shoal.adapters.training.methods.source import Source
from shoal.adapters.training.methods.table import attach_all
from shoal.adapters.training.metrics import read_steps
from shoal.adapters.training.trainer import train

log = logging.getLogger(__name__)

TASK = "words"
# Steps timed, after those in which shapes are first seen.
STEPS, SKIPPED = 60, 30
# Seconds foreseen for one method.
ONE_S = 45.0
# The ranks of the tables, and four times them for what grows with the rank.
SETTINGS: tuple[Setting, ...] = (
    lora(LORA_RANK),
    lora_xs(16),
    lora(16),
    miss(MISS_RANK),
    PISSA,
    DORA,
    MILORA,
    lora_xs(16, " randomised", svd="randomised"),
    plain("PiSSA exact", "pissa", svd="exact"),
    lora_xs(4),
    lora_xs(64),
    lora(4 * LORA_RANK),
    miss(4 * MISS_RANK),
    plain("PiSSA", "pissa", 4 * LORA_RANK),
    VERA,
    plain("rsLoRA", "rslora", LORA_RANK, alpha=2.0 * LORA_RANK),
    plain("LoRA+", "lora-plus", LORA_RANK, alpha=2.0 * LORA_RANK),
    plain("AdaLoRA", "adalora"),
    Setting("SVF", "svf"),
    Setting("SVFT", "svft"),
)


def measure_costs(lab: Lab, clock: Clock, settings: tuple[Setting, ...] = SETTINGS) -> bool:
    """Measure what is not in the log; False when time ran out."""
    todo: list[tuple[str, str, Callable[[], dict[str, Any]]]] = [
        (f"cost-{setting.id}", setting.label, partial(_cost, lab, setting)) for setting in settings
    ]
    done = lab.log.by_id("cost")
    for name, label, measure in todo:
        if name in done:
            continue
        if clock.left() < ONE_S:
            return False
        started = time.monotonic()
        lab.log.append("cost", id=name, label=label, **measure(), **place())
        log.info("cost of %r seconds=%.1f", label, time.monotonic() - started)
    return True


def _cost(lab: Lab, setting: Setting) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as cache:
        fresh, _ = _initialisation(lab, setting, Path(cache))
        cached, parameters = _initialisation(lab, setting, Path(cache))
        steps = _steps(lab, setting, Path(cache))
    return {
        "method": setting.method,
        "options": setting.asked,
        "parameters": parameters,
        "init_seconds": round(fresh, 4),
        "cached_init_seconds": round(cached, 4),
        **steps,
    }


def _initialisation(lab: Lab, setting: Setting, cache: Path) -> tuple[float, int]:
    """Seconds from a loaded base to an adapted one, and how many values are trained."""
    device = device_of(lab.device)
    config = config_of(lab, Group(setting, TASK, ((1, 1e-4),)), lab.out / "costs")
    base = load_base(lab.base, device, "auto")
    shape = shape_of(base.model, base.path.stem, base.digest)
    _wait(device)
    started = time.perf_counter()
    source = Source(exact_weights(base), shape, cache, basis_rank=config.basis_rank)
    adapted = attach_all(base.model, config, source)
    _wait(device)
    seconds = time.perf_counter() - started
    factors = (factor for linear in adapted.values() for factor in linear.factors().values())
    return seconds, sum(factor.numel() for factor in factors)


def _steps(lab: Lab, setting: Setting, cache: Path) -> dict[str, Any]:
    """Time and memory of steps, as a user of the trainer has them."""
    group = Group(setting, TASK, ((1, 1e-4),), STEPS)
    with tempfile.TemporaryDirectory() as out:
        config = config_of(lab, group, Path(out), validate=False)
        forget_peak()
        [result] = train(config, lanes=[Lane("one", 1, 1e-4)], cache_dir=cache, progress=False)
        seconds = [step.seconds for step in read_steps(Path(out) / "one" / "metrics.jsonl")]
    return _summary(seconds, result.peak_bytes)


def _summary(seconds: list[float], peak: int) -> dict[str, Any]:
    timed = [1e3 * second for second in seconds[min(SKIPPED, len(seconds) // 2) :]]
    return {
        "step_ms": round(statistics.median(timed), 3),
        "step_ms_p90": round(sorted(timed)[int(0.9 * (len(timed) - 1))], 3),
        "steps": len(timed),
        "peak_memory": peak,
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
