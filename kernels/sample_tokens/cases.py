"""Inputs of ``sample_tokens`` for its tests and its benchmark, and which tokens are acceptable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from shoal.kernels.sample_tokens.reference import sample_tokens_reference
from shoal.kernels.testing import poisoned_rows, random


class Row(NamedTuple):
    """What one row asks for."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


GREEDY = Row(0.0)
MIXED = (
    GREEDY,
    Row(),
    Row(0.7, top_k=5),
    Row(1.3, top_p=0.9),
    Row(0.9, min_p=0.05),
    Row(1e-5, top_k=3),
    Row(1.0, top_k=40, top_p=0.6, min_p=0.02),
    Row(2.0, top_k=10**9, top_p=1.0),
    Row(0.5, top_k=1),
    Row(1.0, top_p=1e-9),
    Row(1.0, top_p=0.999, min_p=1.0),
    Row(0.01, top_p=0.5),
    Row(1.5, top_k=1000, top_p=0.3),
)


@dataclass(frozen=True, slots=True)
class Case:
    """One shape of input; rows are views with NaN around them, and ask in turn for ``asked``.

    Attributes:
        spread: standard deviation of the logits; 0 makes them all equal.
        levels: distinct values of the logits, so that there are ties; 0: as they come.
        masked: one logit in so many is -inf; 0: none.
        spoilt: one row in so many holds a NaN, a +inf or only -inf; 0: none.
    """

    name: str
    rows: int
    vocab: int
    asked: tuple[Row, ...] = MIXED
    spread: float = 3.0
    levels: int = 0
    masked: int = 0
    spoilt: int = 0
    scaled: bool = False
    softcap: float | None = None
    greedy_only: bool = False
    gpu_only: bool = False


CASES = (
    Case("empty", rows=0, vocab=8),
    Case("one token", rows=4, vocab=1),
    Case("greedy", rows=5, vocab=5003, asked=(GREEDY,), greedy_only=True, levels=40, spoilt=3),
    Case("greedy, scaled", rows=3, vocab=300, asked=(GREEDY,), greedy_only=True, scaled=True),
    Case("small", rows=len(MIXED), vocab=50),
    Case("ties", rows=len(MIXED), vocab=257, levels=5, spread=1.0),
    Case("all equal", rows=len(MIXED), vocab=99, spread=0.0),
    Case("divides nothing", rows=len(MIXED), vocab=9001, masked=7, spoilt=5),
    Case("flat", rows=len(MIXED), vocab=6007, spread=0.3),
    Case("softcap", rows=len(MIXED), vocab=2049, softcap=4.0, scaled=True, masked=5),
    Case("scaled", rows=len(MIXED), vocab=4097, scaled=True, spoilt=4),
    Case("largest", rows=300, vocab=128256, gpu_only=True, spoilt=9),
    Case("largest, flat", rows=64, vocab=262144, gpu_only=True, spread=0.5, softcap=30.0),
)


class Inputs(NamedTuple):
    """Arguments of ``sample_tokens``, in the reference's order."""

    logits: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    uniform: Tensor
    scale: Tensor | None
    softcap: float | None
    greedy_only: bool


class Keywords(TypedDict):
    """Arguments of ``sample_tokens`` besides the logits."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    uniform: Tensor
    scale: Tensor | None
    softcap: float | None
    greedy_only: bool


def launch_arguments(inputs: Inputs) -> Keywords:
    """What to call the op with, besides ``inputs.logits``."""
    return Keywords(
        temperature=inputs.temperature,
        top_k=inputs.top_k,
        top_p=inputs.top_p,
        min_p=inputs.min_p,
        uniform=inputs.uniform,
        scale=inputs.scale,
        softcap=inputs.softcap,
        greedy_only=inputs.greedy_only,
    )


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Random inputs; the uniform numbers include 0 and the largest below 1."""
    generator = torch.Generator().manual_seed(seed)
    values = random((case.rows, case.vocab), generator, torch.float32, case.spread)
    if case.levels:
        values = (values * case.levels / 8).round() * 8 / case.levels
    if case.masked:
        hidden = torch.randint(0, case.masked, values.shape, generator=generator) == 0
        values = values.masked_fill(hidden, -torch.inf)
    if case.spoilt:
        for i, row in enumerate(range(0, case.rows, case.spoilt)):
            at = int(torch.randint(0, case.vocab, (1,), generator=generator))
            if i % 3 == 2:
                values[row] = -torch.inf
            else:
                values[row, at] = (torch.nan, torch.inf)[i % 3]
    asked = [case.asked[i % len(case.asked)] for i in range(case.rows)]
    uniform = torch.rand(case.rows, generator=generator, dtype=torch.float64)
    uniform[::7] = 0.0
    uniform[3::7] = 1 - 2**-53
    scale = torch.rand(case.rows, generator=generator) + 0.5 if case.scaled else None
    return Inputs(
        poisoned_rows(values.to(dtype).to(device)),
        *parameters(asked, device),
        uniform.to(device),
        None if scale is None else scale.to(device),
        case.softcap,
        case.greedy_only,
    )


def parameters(rows: list[Row], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Temperature, top_k, top_p and min_p of the rows."""
    columns = tuple(zip(*rows, strict=True)) if rows else ((), (), (), ())
    dtypes = (torch.float32, torch.int32, torch.float32, torch.float32)
    a, b, c, d = (
        torch.tensor(column, dtype=dtype, device=device)
        for column, dtype in zip(columns, dtypes, strict=True)
    )
    return a, b, c, d


def wrong_rows(actual: Tensor, inputs: Inputs, slack: float = 2e-6) -> list[int]:
    """Rows whose token the rules do not give for any rounding of their numbers.

    The kernel's sums are float32: ``uniform``, ``top_p`` and ``min_p`` may act as if they were off
    by ``slack`` (of themselves, or of one). A row without them must be the reference's.
    """
    wrong = torch.ones(actual.shape[0], dtype=torch.bool, device=actual.device)
    for p in (0, -slack, slack):
        for m in (0, -slack, slack):
            for u in (0, -slack, slack):
                nudged = inputs._replace(
                    top_p=torch.where(inputs.top_p < 1, inputs.top_p + p, inputs.top_p),
                    min_p=torch.where(inputs.min_p < 1, inputs.min_p * (1 + m), inputs.min_p),
                    uniform=(inputs.uniform + u).clamp(0, 1 - 2**-53),
                )
                wrong &= actual != sample_tokens_reference(*nudged)
                if not wrong.any():
                    return []
    return wrong.nonzero().flatten().tolist()
