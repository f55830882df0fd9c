"""One step: what is learnt of a batch, and how it is run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from shoal.adapters.base import base_digest
from shoal.adapters.training import runner, token_loss
from shoal.adapters.training.activations import checkpoint_activations
from shoal.adapters.training.attention import causal_attention
from shoal.adapters.training.config import TrainConfig
from shoal.adapters.training.data import Batch, Example, collate, join
from shoal.adapters.training.data.batches import packed_mask
from shoal.adapters.training.inputs import Shape, StepInputs, step_inputs, supervised_per_lane
from shoal.adapters.training.loss import LaneLoss
from shoal.adapters.training.method_options import METHOD_NAMES, RANKLESS, MethodName
from shoal.adapters.training.methods.attaching import shape_of, weight_reader
from shoal.adapters.training.methods.source import Source
from shoal.adapters.training.methods.table import attach_all, method_of
from shoal.adapters.training.runner import CapturedRunner, EagerRunner, StepRunner
from shoal.adapters.training.step import TrainStep

CPU = torch.device("cpu")
LANES = 2


def example(*tokens: int, learnt: int = 2) -> Example:
    """Its last tokens are learnt."""
    plain = len(tokens) - learnt
    return Example(tokens, (False,) * plain + (True,) * learnt)


SHORT = example(5, 6, 7, 8)
LONG = example(*range(9, 19), learnt=5)
OTHER = example(3, 4, 40, 41, 42, learnt=3)


def make_step(base: Path, root: Path, **options: Any) -> TrainStep:
    """Two lanes of LoRA on the tiny base, unless told otherwise."""
    model = AutoModelForCausalLM.from_pretrained(base)
    asked = {"method": "lora", "seed": 1, **options}
    if asked["method"] not in RANKLESS:
        asked["rank"] = 2
    config = TrainConfig(base=base, data=base, out=root, **asked)
    shape = shape_of(model, "tiny", base_digest(base))
    source = Source(weight_reader(model), shape, root / "bases")
    adapted = attach_all(model, config, source, [1, 2])
    if config.checkpoint_activations:
        checkpoint_activations(model)
    step = TrainStep(model, adapted, method_of(config), parts=2)
    step.optimizer.lr.fill_(0.01)
    return step


def batch_of(*rows: Example, packed: bool = False) -> Batch:
    return collate(rows, 0, CPU, packed=packed)


def inputs_of(*batches: Batch, fixed_shapes: bool = False) -> list[StepInputs]:
    counts = supervised_per_lane(batches, LANES)
    return [step_inputs(batch, counts, fixed_shapes=fixed_shapes) for batch in batches]


def steps_of_batches(*, fixed_shapes: bool) -> list[list[StepInputs]]:
    """Three steps of two passes, of several shapes."""
    batches = [
        (batch_of(SHORT, LONG, OTHER, SHORT), batch_of(LONG, OTHER, SHORT, SHORT)),
        (batch_of(SHORT, OTHER), batch_of(OTHER, OTHER)),
        (batch_of(LONG, SHORT, SHORT, OTHER), batch_of(SHORT, SHORT, OTHER, LONG)),
    ]
    return [inputs_of(*passes, fixed_shapes=fixed_shapes) for passes in batches]


def run(runner: StepRunner, *, fixed_shapes: bool) -> tuple[Tensor, list[Tensor]]:
    records = []
    for batches in steps_of_batches(fixed_shapes=fixed_shapes):
        runner.run(batches)
        records.append(runner.step.record.clone())
    return runner.step.optimizer.values.clone(), records


def test_the_loss_of_a_lane_is_the_mean_over_its_tokens_of_the_step(base: Path) -> None:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base)
    loss = LaneLoss(model)
    passes = inputs_of(batch_of(SHORT, LONG, OTHER, SHORT), batch_of(LONG, SHORT, SHORT, OTHER))
    with torch.no_grad():
        total = sum(loss(inputs) for inputs in passes)
    reference = AutoModelForCausalLM.from_pretrained(base)

    def mean(*rows: Example) -> float:
        nll = []
        for row in rows:
            with torch.no_grad():
                logits = reference(input_ids=torch.tensor([row.input_ids])).logits[0]
            chances = logits.log_softmax(-1)
            for place, learnt in enumerate(row.supervised):
                if learnt:
                    nll.append(-float(chances[place - 1, row.input_ids[place]]))
        return sum(nll) / len(nll)

    assert isinstance(total, Tensor)
    expected = [mean(SHORT, LONG, LONG, SHORT), mean(OTHER, SHORT, SHORT, OTHER)]
    assert total.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1 << 23, 250])
def test_token_losses_are_cross_entropy(
    chunk: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_loss, "CHUNK_VALUES", chunk)
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn((7, 100), generator=generator) * 5).to(dtype).requires_grad_()
    labels = torch.randint(0, 100, (7,), generator=generator)
    weights = torch.rand(7, generator=generator)
    ours = token_loss.token_losses(logits, labels)
    expected = F.cross_entropy(logits.float(), labels, reduction="none")
    torch.testing.assert_close(ours, expected)

    [gradient] = torch.autograd.grad((ours * weights).sum(), logits)
    [theirs] = torch.autograd.grad((expected * weights).sum(), logits)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, theirs)


def test_padding_to_fixed_shapes_changes_no_loss(base: Path) -> None:
    loss = LaneLoss(AutoModelForCausalLM.from_pretrained(base))
    rows = (SHORT, LONG, OTHER, SHORT)
    [exact] = inputs_of(batch_of(*rows))
    [padded] = inputs_of(collate(rows, 0, CPU, multiple=64), fixed_shapes=True)

    assert padded.shape == Shape(4, 64, 2, 64, False)
    assert exact.shape == Shape(4, 10, 2, 7, False)
    with torch.no_grad():
        torch.testing.assert_close(loss(padded), loss(exact), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_padded_to_a_larger_shape_is_the_same_batch(packed: bool, base: Path) -> None:
    loss = LaneLoss(AutoModelForCausalLM.from_pretrained(base))
    rows = (join([SHORT, LONG]), OTHER) if packed else (SHORT, LONG, OTHER, SHORT)
    [exact] = inputs_of(batch_of(*rows, packed=packed))
    padded = exact.padded(30, 20)

    assert padded.shape == exact.shape._replace(length=30, capacity=20)
    assert padded.shape.holds(exact.shape)
    assert not exact.shape.holds(padded.shape)
    with torch.no_grad():
        torch.testing.assert_close(loss(padded), loss(exact), atol=1e-5, rtol=1e-5)
    # What fills up a lane points into the lane's own rows.
    per_lane = exact.shape.rows_per_lane * 30
    lanes_of_places = padded.positions // per_lane
    assert lanes_of_places.tolist() == [[0] * 20, [1] * 20]


def test_a_slightly_smaller_batch_is_replayed_from_a_recording(base: Path, tmp_path: Path) -> None:
    recorder = Replayed()
    replayed = CapturedRunner(make_step(base, tmp_path), recorder)
    eager = EagerRunner(make_step(base, tmp_path))
    shorter = example(*range(9, 18), learnt=5)
    far_shorter = example(5, 6, 7)
    for rows in ((LONG, SHORT), (shorter, SHORT), (far_shorter, far_shorter)):
        replayed.run(inputs_of(batch_of(*rows)))
        eager.run(inputs_of(batch_of(*rows)))
        torch.testing.assert_close(replayed.step.record, eager.step.record, atol=1e-4, rtol=1e-4)
    assert recorder.recordings == 1 + 2


def test_records_in_one_row_do_not_see_each_other(base: Path) -> None:
    loss = LaneLoss(AutoModelForCausalLM.from_pretrained(base))
    packed = batch_of(join([SHORT, LONG]), join([OTHER, SHORT, SHORT]), packed=True)
    apart = [batch_of(SHORT, OTHER), batch_of(LONG, SHORT), batch_of(SHORT, SHORT)]
    [together] = inputs_of(packed)
    singles = [step_inputs(batch, [1, 1]) for batch in apart]
    with torch.no_grad():
        nll = [loss(inputs) for inputs in singles]
        expected = [
            float(nll[0][0] + nll[1][0]) / 7,
            float(nll[0][1] + nll[1][1] + nll[2][1]) / 7,
        ]
        assert loss(together).tolist() == pytest.approx(expected, rel=1e-4)


def test_a_lane_that_is_not_finite_leaves_the_others_loss_alone(base: Path, tmp_path: Path) -> None:
    step = make_step(base, tmp_path)
    [inputs] = inputs_of(batch_of(SHORT, LONG, OTHER, SHORT), fixed_shapes=True)
    step.optimizer.values[0] = float("nan")
    step.begin()
    step.accumulate(inputs)
    gradients = [p.grad[1] for p in map(_parameter, step.adapted.values()) if p.grad is not None]

    assert not step.loss[0].isfinite()
    assert step.loss[1].isfinite()
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_lane_whose_loss_alone_is_not_finite_is_not_updated(base: Path, tmp_path: Path) -> None:
    step = make_step(base, tmp_path)
    [inputs] = inputs_of(batch_of(SHORT, LONG, OTHER, SHORT))
    step.begin()
    step.accumulate(inputs)
    step.loss[1] = float("inf")  # the gradient is finite
    before = step.optimizer.values.clone()
    step.update()
    moved = (step.optimizer.values != before).any(dim=1)
    assert moved.tolist() == [True, False]
    assert step.record[2].tolist() == [1.0, 0.0]


def _parameter(linear: Any) -> torch.nn.Parameter:
    factor: torch.nn.Parameter = linear.factors()["B"]
    return factor


def test_computing_activations_again_changes_no_bit(base: Path, tmp_path: Path) -> None:
    plain, records = run(EagerRunner(make_step(base, tmp_path)), fixed_shapes=False)
    again = make_step(base, tmp_path, checkpoint_activations=True)
    values, other_records = run(EagerRunner(again), fixed_shapes=False)

    assert torch.equal(values, plain)
    assert all(torch.equal(a, b) for a, b in zip(records, other_records, strict=True))


class NothingReadBack(TorchDispatchMode):
    """Fails at what waits for the device or brings something to it: no CUDA graph can hold it."""

    ops = torch.ops.aten
    refused = (
        ops._local_scalar_dense, ops.nonzero, ops.masked_select, ops._unique2, ops.lift_fresh,
        ops.equal,
    )  # fmt: skip

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket not in self.refused, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_a_step_of_every_method_can_be_recorded(
    method: MethodName, packed: bool, base: Path, tmp_path: Path
) -> None:
    step = make_step(base, tmp_path, method=method, checkpoint_activations=packed)
    rows = (join([SHORT, LONG]), join([OTHER, SHORT])) if packed else (SHORT, LONG)
    [inputs] = inputs_of(batch_of(*rows, packed=packed), fixed_shapes=True)
    with NothingReadBack():
        step.begin()
        step.accumulate(inputs)
        step.update()
    assert step.record[2].tolist() == [1, 1]


class Replayed:
    """Stands for a recorder of CUDA graphs: the work runs for nothing before it is replayed."""

    def __init__(self) -> None:
        self.recordings = 0

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        self.recordings += 1
        for _ in range(2):
            work()
        return work


@pytest.mark.parametrize("max_graphs", [24, 1])
def test_a_replayed_step_is_the_same_step(
    max_graphs: int, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "MAX_GRAPHS", max_graphs)
    recorder = Replayed()
    replayed = CapturedRunner(make_step(base, tmp_path), recorder)
    values, records = run(replayed, fixed_shapes=True)
    eager = EagerRunner(make_step(base, tmp_path))
    expected, expected_records = run(eager, fixed_shapes=True)

    # The update, and as many shapes as there are, or as may be.
    assert recorder.recordings == 1 + min(max_graphs, 2)
    assert torch.equal(values, expected)
    assert replayed.step.optimizer.steps.tolist() == [3, 3]
    assert all(torch.equal(a, b) for a, b in zip(records, expected_records, strict=True))


def test_a_step_that_cannot_be_recorded_is_run_all_the_same(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(Replayed):
        def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
            if self.recordings == 2:
                raise RuntimeError("not while capturing")
            return super().__call__(work)

    values, _ = run(CapturedRunner(make_step(base, tmp_path), Failing()), fixed_shapes=True)
    expected, _ = run(EagerRunner(make_step(base, tmp_path)), fixed_shapes=True)
    assert torch.equal(values, expected)
    assert "not while capturing" in caplog.text


def test_recording_alone_changes_nothing(base: Path, tmp_path: Path) -> None:
    step = make_step(base, tmp_path)
    step.optimizer.active[1] = False
    before = {name: tensor.clone() for name, tensor in step.optimizer.state().items()}

    def fails(work: Callable[[], None]) -> Callable[[], None]:
        work()
        raise RuntimeError("not while capturing")

    CapturedRunner(step, Replayed())
    with pytest.raises(RuntimeError, match="not while capturing"):
        CapturedRunner(step, fails)
    after = step.optimizer.state()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_gradients_are_summed_between_the_passes_and_the_update(base: Path, tmp_path: Path) -> None:
    """Two processes with half the rows each, in one process."""
    whole = EagerRunner(make_step(base, tmp_path))
    halves = [make_step(base, tmp_path) for _ in range(2)]
    batch = batch_of(SHORT, LONG, OTHER, SHORT)
    counts = supervised_per_lane([batch], LANES)
    whole.run([step_inputs(batch, counts)])
    for rank, half in enumerate(halves):
        half.begin()
        half.accumulate(step_inputs(batch, counts, rows=slice(rank, rank + 1)))
    torch.testing.assert_close(whole.step.loss, halves[0].loss + halves[1].loss)
    total = halves[0].optimizer.grads + halves[1].optimizer.grads
    torch.testing.assert_close(whole.step.optimizer.grads, total, atol=1e-6, rtol=1e-4)


def test_a_token_sees_its_own_record_up_to_itself() -> None:
    mask = packed_mask(torch.tensor([[1, 1, 2, 0, 0]]))[0, 0]
    seen = [[key for key in range(5) if mask[query, key]] for query in range(5)]
    assert seen == [[0], [0, 1], [2], [3], [3, 4]]


@pytest.mark.parametrize("packed", [False, True])
def test_a_sliding_window_hides_what_is_too_far_back(packed: bool) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn((3, 1, 2, 6, 4))
    mask = packed_mask(torch.tensor([[1, 1, 1, 1, 2, 2]])) if packed else None
    module = torch.nn.Module()
    seen, _ = causal_attention(module, query, key, value, mask, sliding_window=3)
    # A key that is too far back, and one of another record, may be anything.
    key[:, :, 0] = 100.0
    changed, _ = causal_attention(module, query, key, value, mask, sliding_window=3)
    assert torch.equal(changed[:, 3:], seen[:, 3:])
    assert not torch.equal(changed[:, 2], seen[:, 2])
