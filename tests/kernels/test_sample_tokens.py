"""sample_tokens: the kernel follows the reference, and the reference the definition of its rules.

On a CPU the kernel runs in Triton's interpreter; with SHOAL_TEST_GPU=1 on a GPU, compiled.
"""

import math
import os
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.kernels.errors import ShapeError
from shoal.kernels.sample_tokens.cases import (
    CASES,
    GREEDY,
    MIXED,
    Case,
    Inputs,
    Row,
    launch_arguments,
    make_inputs,
    parameters,
    wrong_rows,
)
from shoal.kernels.sample_tokens.kernel import SampleConfig, launch_sample_tokens, sample_tokens
from shoal.kernels.sample_tokens.reference import sample_tokens_reference

ON_GPU = "SHOAL_TEST_GPU" in os.environ
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
RUNNABLE = [case for case in CASES if ON_GPU or not case.gpu_only]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BY_NAME = {case.name: case for case in CASES}
BELOW_ONE = 1 - 2**-53

# Infinities are part of the arithmetic; the interpreter's NumPy remarks on them, a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|All-NaN slice) enc")


def launch(inputs: Inputs, config: SampleConfig | None = None) -> torch.Tensor:
    return launch_sample_tokens(inputs.logits, **launch_arguments(inputs), config=config)


def one_row(logits: torch.Tensor, row: Row, uniforms: torch.Tensor) -> Inputs:
    """The same row and wishes once for each uniform number."""
    count = uniforms.numel()
    return Inputs(
        logits.to(DEVICE).expand(count, -1),
        *parameters([row] * count, DEVICE),
        uniforms.to(DEVICE, torch.float64),
        scale=None,
        softcap=None,
        greedy_only=False,
    )


def kept_by_definition(logits: list[float], row: Row) -> dict[int, float]:
    """Probability of each token the filters leave, one token at a time."""
    weights = [math.exp((x - max(logits)) / row.temperature) for x in logits]
    ranked = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if row.top_k:
        ranked = ranked[: row.top_k]
    mass = sum(weights[i] for i in ranked)
    kept, before = [], 0.0
    for i in ranked:
        if row.top_p < 1 and kept and before >= row.top_p * mass:
            break
        kept.append(i)
        before += weights[i]
    kept = [i for i in kept if weights[i] >= row.min_p or i == ranked[0]]
    total = sum(weights[i] for i in kept)
    return {i: weights[i] / total for i in kept}


# Logits that share values, so that ties decide; temperatures and filters without a rule that
# float32 and float64 could round apart (their products are not at a border).
wishes = st.builds(
    Row,
    temperature=st.sampled_from([0.3, 0.7, 1.0, 1.9]),
    top_k=st.sampled_from([0, 1, 2, 3, 5, 8, 100]),
    top_p=st.sampled_from([1.0, 1e-6, 0.1234, 0.4321, 0.789, 0.98765]),
    min_p=st.sampled_from([0.0, 0.0321, 0.4567]),
)
shared_logits = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=12)
GRID = (torch.arange(500, dtype=torch.float64) + 0.5) / 500


@settings(max_examples=100, deadline=None)
@given(shared_logits, wishes)
def test_reference_draws_with_the_probabilities_of_the_definition(
    logits: list[float], row: Row
) -> None:
    want = kept_by_definition(logits, row)
    inputs = one_row(torch.tensor(logits), row, GRID)
    drawn = sample_tokens_reference(*inputs)
    assert drawn.tolist() == sorted(drawn.tolist()), "not in vocabulary order"
    for token, count in enumerate(torch.bincount(drawn, minlength=len(logits)).tolist()):
        assert abs(count / 500 - want.get(token, 0.0)) <= 1 / 500 + 1e-9


@settings(max_examples=6, deadline=None)
@given(shared_logits, wishes)
def test_kernel_equals_reference_on_small_rows_full_of_ties(logits: list[float], row: Row) -> None:
    uniforms = torch.tensor([0.0, 0.37, 0.83, BELOW_ONE], dtype=torch.float64)
    inputs = one_row(torch.tensor(logits, dtype=torch.bfloat16), row, uniforms)
    assert wrong_rows(launch(inputs), inputs) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", RUNNABLE, ids=lambda c: c.name)
def test_kernel_equals_reference(case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype, DEVICE, seed=2)
    before = inputs.logits.clone()
    actual = launch(inputs)
    assert actual.dtype == torch.int64
    assert wrong_rows(actual, inputs) == []
    assert torch.equal(inputs.logits.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("run", [launch, lambda i: sample_tokens(i.logits, **launch_arguments(i))])
def test_a_row_draws_the_same_alone_and_in_any_batch(run: Callable[[Inputs], torch.Tensor]) -> None:
    case = Case("", rows=6, vocab=5003, asked=(*MIXED[:5], MIXED[6]))
    inputs = make_inputs(case, torch.float16, DEVICE, seed=3)
    together = run(inputs).tolist()
    for i, token in enumerate(together):
        alone = inputs._replace(
            **{
                name: value[i : i + 1]
                for name, value in inputs._asdict().items()
                if isinstance(value, torch.Tensor)
            }
        )
        assert run(alone).tolist() == [token], i


@pytest.mark.parametrize("span", [2, 3, 100])
def test_how_a_row_is_divided_changes_nothing(span: int) -> None:
    case = Case("", rows=4, vocab=9001, asked=(GREEDY, Row(), Row(1.0, 40, 0.6, 0.02)))
    inputs = make_inputs(case, torch.bfloat16, DEVICE, seed=4)
    assert torch.equal(launch(inputs, SampleConfig(span=span)), launch(inputs))


@pytest.mark.parametrize("run", [launch, lambda i: sample_tokens_reference(*i)])
@pytest.mark.parametrize("row", [GREEDY, Row(), Row(top_k=3), Row(top_p=0.5)], ids=str)
def test_a_row_without_a_finite_maximum_gives_minus_one(
    run: Callable[[Inputs], torch.Tensor], row: Row
) -> None:
    logits = torch.zeros(7, 5000)
    logits[0, 4999] = torch.nan
    logits[1, 0] = -torch.nan
    logits[2, 2500] = torch.inf
    logits[3] = -torch.inf
    logits[4, 1:] = -torch.inf  # one token is left
    logits[5] = torch.nan
    inputs = Inputs(
        logits.to(DEVICE), *parameters([row] * 7, DEVICE),
        torch.full((7,), 0.9, dtype=torch.float64, device=DEVICE), None, None, False,
    )  # fmt: skip
    tokens = run(inputs).tolist()
    assert tokens[:6] == [-1, -1, -1, -1, 0, -1]
    assert tokens[6] >= 0
    spoilt = torch.tensor([1.0, 0.0, -1.0, math.nan, math.inf, 1.0, 2.0], device=DEVICE)
    scaled = inputs._replace(logits=torch.zeros_like(inputs.logits), scale=spoilt)
    assert [t < 0 for t in run(scaled).tolist()] == [False, True, True, True, True, False, False]


@pytest.mark.parametrize("run", [launch, lambda i: sample_tokens_reference(*i)])
def test_among_equals_the_lowest_index_wins(run: Callable[[Inputs], torch.Tensor]) -> None:
    logits = torch.full((5000,), -1.0)
    logits[[1234, 3000, 4999]] = 2.0
    for row in (GREEDY, Row(top_k=1), Row(top_p=1e-9), Row(top_k=2, top_p=0.4)):
        assert run(one_row(logits, row, torch.tensor([0.999]))).tolist() == [1234]
    two = one_row(logits, Row(top_k=2), torch.tensor([0.0, 0.49, 0.51, BELOW_ONE]))
    assert run(two).tolist() == [1234, 1234, 3000, 3000]
    zeros = torch.tensor([-1.0, -0.0, 0.0, -0.0])
    for row in (GREEDY, Row(top_k=1)):
        assert run(one_row(zeros, row, torch.tensor([BELOW_ONE]))).tolist() == [1]


def test_the_kernel_draws_with_the_probabilities_of_a_long_row() -> None:
    # One hot token at the far end and a tail of 10,000: shares of the tail's quarters.
    logits = torch.zeros(10_001)
    logits[-1] = math.log(10_000.0)
    inputs = one_row(logits, Row(), torch.linspace(0, 0.999, 12, dtype=torch.float64))
    drawn = launch(inputs)
    want = (inputs.uniform * 20_000).floor().clamp(max=10_000)
    assert (drawn - want).abs().max() <= 1


def test_greedy_only_reads_no_parameter_and_out_is_written() -> None:
    inputs = make_inputs(BY_NAME["small"], torch.float16, DEVICE, seed=5)
    out = torch.full((inputs.logits.shape[0],), 7, device=DEVICE)
    for op in (launch_sample_tokens, sample_tokens):
        arguments = launch_arguments(inputs._replace(greedy_only=True))
        assert op(inputs.logits, **arguments, out=out.fill_(7)) is out
        assert torch.equal(out, inputs.logits.argmax(dim=-1))


@pytest.mark.skipif(not ON_GPU, reason="a CPU has no graphs")
def test_a_captured_call_follows_its_inputs() -> None:
    inputs = make_inputs(BY_NAME["largest"], torch.bfloat16, DEVICE, seed=6)
    out = torch.empty(inputs.logits.shape[0], dtype=torch.int64, device=DEVICE)
    arguments = launch_arguments(inputs)
    sample_tokens(inputs.logits, **arguments, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sample_tokens(inputs.logits, **arguments, out=out)
    other = make_inputs(BY_NAME["largest"], torch.bfloat16, DEVICE, seed=7)
    for target, source in zip(inputs, other, strict=True):
        if isinstance(target, torch.Tensor) and isinstance(source, torch.Tensor):
            target.copy_(source)
    graph.replay()
    assert torch.equal(out, launch(other))


def fail_logits(i: Inputs) -> Inputs:
    return i._replace(logits=i.logits.t())


def fail_temperature(i: Inputs) -> Inputs:
    return i._replace(temperature=i.temperature[1:])


def fail_top_k(i: Inputs) -> Inputs:
    return i._replace(top_k=i.top_k.long())


def fail_uniform(i: Inputs) -> Inputs:
    return i._replace(uniform=i.uniform.float())


def fail_scale(i: Inputs) -> Inputs:
    return i._replace(scale=torch.ones(1, device=DEVICE))


def fail_softcap(i: Inputs) -> Inputs:
    return i._replace(softcap=0.0)


@pytest.mark.parametrize(
    "spoil", [fail_logits, fail_temperature, fail_top_k, fail_uniform, fail_scale, fail_softcap]
)
def test_a_wrong_argument_is_named(spoil: Callable[[Inputs], Inputs]) -> None:
    inputs = make_inputs(BY_NAME["small"], torch.float32, DEVICE, seed=5)
    with pytest.raises(ShapeError) as caught:
        launch(spoil(inputs))
    assert caught.value.argument == spoil.__name__.removeprefix("fail_")
