"""Benchmark of ``sample_tokens``: ``python -m shoal.kernels.sample_tokens.bench``.

``--check`` and ``--sweep`` as in every bench.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from shoal.kernels.benching import Bench, OpBench, Record, run
from shoal.kernels.launching import kernel_runs_on
from shoal.kernels.sample_tokens.cases import (
    CASES,
    GREEDY,
    Inputs,
    Row,
    launch_arguments,
    make_inputs,
    parameters,
    wrong_rows,
)
from shoal.kernels.sample_tokens.kernel import SampleConfig, launch_sample_tokens, sample_tokens
from shoal.kernels.testing import TOLERANCE

VOCAB = 128256
NUCLEUS = Row(0.8, top_p=0.95)
WISHES: dict[str, tuple[Row, ...]] = {
    "greedy": (GREEDY,),
    "greedy, few drawn": (*(GREEDY,) * 31, Row()),
    "plain": (Row(),),
    "top-p": (NUCLEUS,),
    "top-k": (Row(top_k=50),),
    "all filters": (Row(0.8, 50, 0.9, 0.02),),
}
SWEEP_GREEDY = tuple(
    SampleConfig(chunk=chunk, span=span, scan_warps=warps)
    for chunk, warps in ((1024, 2), (1024, 4), (2048, 4), (4096, 4), (4096, 8))
    for span in (1, 2, 4, 8, 16)
)
SWEEP_DRAWN = tuple(
    SampleConfig(block=block, pick_warps=warps, pick_registers=registers)
    for block, warps, registers in (
        (2048, 8, 64), (2048, 8, 128), (2048, 16, 64), (4096, 8, 128), (4096, 16, 64),
        (4096, 16, 128), (8192, 16, 64), (8192, 16, 128), (8192, 32, 64),
    )
)  # fmt: skip


def check(device: torch.device) -> dict[torch.dtype, float]:
    """1 for a dtype in which a token is not the one the rules give, else 0."""
    op = launch_sample_tokens if kernel_runs_on(device) else sample_tokens
    errors = dict.fromkeys(TOLERANCE, 0.0)
    for case in CASES:
        if case.gpu_only and device.type == "cpu":
            continue
        for dtype in TOLERANCE:
            inputs = make_inputs(case, dtype, device, seed=7)
            if wrong_rows(op(inputs.logits, **launch_arguments(inputs)), inputs):
                errors[dtype] = 1.0
    return errors


def _logits(rows: int, vocab: int, device: torch.device, dtype: torch.dtype, flat: bool) -> Tensor:
    """Like a trained model's, a few tokens far above the rest; flat: all of them likely."""
    logits = torch.randn((rows, vocab), device=device)
    if not flat:
        best = torch.randint(0, vocab, (rows, 64), device=device)
        logits.scatter_(1, best, torch.linspace(18, 8, 64, device=device).expand(rows, 64))
    return logits.to(dtype)


def _torch_only(inputs: Inputs) -> None:
    """What one writes without a kernel: sort, filter, draw. It has no host synchronisation."""
    logits, temperature, top_k, top_p, min_p, uniform, *_ = inputs
    if inputs.greedy_only:
        logits.argmax(dim=-1)
        return
    probs = torch.softmax(logits.float() / temperature.clamp(min=1e-5).unsqueeze(1), dim=-1)
    probs, order = probs.sort(dim=-1, descending=True)
    rank = torch.arange(probs.shape[1], device=probs.device)
    limit = torch.where(top_k > 0, top_k, probs.shape[1]).unsqueeze(1)
    mass = probs * (rank < limit)
    cumulative = mass.cumsum(dim=-1)
    keep = cumulative - mass < top_p.unsqueeze(1) * cumulative[:, -1:]
    keep &= probs >= min_p.unsqueeze(1) * probs[:, :1]
    cumulative = (mass * keep).cumsum(dim=-1)
    target = uniform.float().unsqueeze(1) * cumulative[:, -1:]
    drawn = order.gather(1, torch.searchsorted(cumulative, target, right=True).clamp(max=rank[-1]))
    torch.where(temperature > 0, drawn.squeeze(1), order[:, 0])


def _record(
    bench: Bench, case: str, rows: int, flat: bool = False, config: SampleConfig | None = None
) -> Record:
    """One row of the table."""
    vocab = VOCAB if bench.on_gpu else 4096
    wishes = WISHES[case]
    asked = [wishes[i % len(wishes)] for i in range(rows)]
    inputs = Inputs(
        _logits(rows, vocab, bench.device, bench.dtype, flat),
        *parameters(asked, bench.device),
        torch.rand(rows, dtype=torch.float64, device=bench.device),
        scale=None,
        softcap=None,
        greedy_only=case == "greedy",
    )
    arguments = launch_arguments(inputs)
    return bench.record(
        "sample_tokens",
        case + (", flat" if flat else ""),
        {"rows": rows, "vocab": vocab},
        lambda: sample_tokens(inputs.logits, **arguments, config=config),
        bytes_moved=rows * vocab * inputs.logits.element_size(),
        baseline=None
        if config
        else ("argmax" if inputs.greedy_only else "sort", lambda: _torch_only(inputs)),
        config=config or "default",
    )


def measure(bench: Bench) -> list[Record]:
    """All rows greedy at every batch size, then each kind of draw at a few."""
    counts = (1, 8, 32, 64, 128, 256) if bench.on_gpu else (1, 8)
    some = (1, 32, 256) if bench.on_gpu else (8,)
    rows = [_record(bench, "greedy", count) for count in counts]
    rows += [_record(bench, case, count) for case in WISHES if case != "greedy" for count in some]
    rows += [_record(bench, case, some[-1], True) for case in ("plain", "top-p", "all filters")]
    return rows


def sweep(bench: Bench) -> list[Record]:
    """Launch variants of the scan, then of the draw."""
    rows = [
        _record(bench, "greedy", count, config=config)
        for count in (1, 32, 128, 256)
        for config in SWEEP_GREEDY
    ]
    return rows + [
        _record(bench, "top-p", count, flat, config)
        for count, flat in ((32, False), (256, False), (256, True))
        for config in SWEEP_DRAWN
    ]


BENCH = OpBench("sample_tokens", check, measure, sweep)

if __name__ == "__main__":
    sys.exit(run([BENCH]))
