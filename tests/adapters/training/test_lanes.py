"""Adapters trained side by side: each is what it would be alone, and ends alone."""

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytest
from safetensors.torch import load_file

from shoal.adapters.training import loop
from shoal.adapters.training.config import MethodName, TrainConfig
from shoal.adapters.training.errors import Diverged, OptionRejected, ResumeMismatch
from shoal.adapters.training.lanes import Lane, lanes_of
from shoal.adapters.training.metrics import StepMetrics, read_evals, read_steps
from shoal.adapters.training.reading import OutcomeReader
from shoal.adapters.training.stopping import BestSoFar
from shoal.adapters.training.trainer import TrainResult

TENSORS = "adapter_model.safetensors"
# Its loss is infinite after the first update.
EXPLODING = 1e30


class Lab(Protocol):
    """The fixture of this folder's conftest.py."""

    base: Path
    data: Path
    root: Path

    def config(self, name: str, **options: Any) -> TrainConfig: ...
    def train(self, name: str, **options: Any) -> TrainResult: ...
    def train_lanes(
        self,
        name: str,
        lanes: list[Lane],
        on_step: Callable[[StepMetrics], None] | None = None,
        **options: Any,
    ) -> list[TrainResult]: ...


def losses(directory: Path) -> list[float]:
    return [step.loss for step in read_steps(directory / "metrics.jsonl")]


def assert_same_adapter(one: Path, other: Path) -> None:
    ours, theirs = load_file(one / TENSORS), load_file(other / TENSORS)
    assert ours.keys() == theirs.keys()
    assert all((ours[key] - theirs[key]).abs().max() <= 1e-5 for key in ours)


@pytest.mark.parametrize("method", ["lora-xs", "adalora"])  # the others: test_method*.py
def test_a_lane_among_others_learns_what_it_learns_alone(method: MethodName, lab: Lab) -> None:
    lanes = [Lane("a", 3), Lane("b", 4, lr=0.003)]
    options: dict[str, Any] = {"method": method, "steps": 3, "lr": 0.001}
    lab.train_lanes("together", lanes, **options)
    lab.train("alone", seed=4, **options | {"lr": 0.003})

    together, apart = lab.root / "together" / "b", lab.root / "alone"
    assert losses(together) == pytest.approx(losses(apart), rel=1e-4)
    assert_same_adapter(together, apart)


def test_lanes_are_measured_and_stopped_as_they_would_be_alone(
    lab: Lab, write_lines: Callable[..., Path]
) -> None:
    # Packed rows to learn, separate ones to measure; each lane's measurements differ.
    measured = write_lines(
        '{"prompt": "ab", "completion": "zzzzzz"}', '{"prompt": "a", "completion": "xyz"}'
    )
    options: dict[str, Any] = {
        "method": "lora", "steps": 16, "schedule": "constant", "warmup": 0.0, "eval_every": 2,
        "patience": 2, "eval_data": measured, "pack": True, "max_length": 64,
    }  # fmt: skip
    lanes = [Lane("slow", 1, lr=0.002), Lane("fast", 2, lr=0.05)]
    together = lab.train_lanes("together", lanes, **options)
    assert len({result.best_loss for result in together}) == 2
    for lane, result in zip(lanes, together, strict=True):
        alone = lab.train(f"alone-{lane.name}", seed=lane.seed, **options | {"lr": lane.lr})
        assert (result.fate, result.steps) == (alone.fate, alone.steps)
        assert result.best_step == alone.best_step
        ours, theirs = lab.root / "together" / lane.name, lab.root / f"alone-{lane.name}"
        evals = [[e.loss for e in read_evals(run / "eval.jsonl")] for run in (ours, theirs)]
        assert evals[0] == pytest.approx(evals[1], rel=1e-4)
        assert_same_adapter(ours, theirs)


def test_lanes_have_data_results_and_records_of_their_own(
    lab: Lab, write_lines: Callable[..., Path]
) -> None:
    other = write_lines('{"prompt": "abcdefgh", "completion": "ijklmnopq"}')
    lanes = [Lane("a", 3), Lane("b", 3, data=other)]
    options: dict[str, Any] = {"method": "lora", "steps": 5, "accumulate": 2}
    results = lab.train_lanes("together", lanes, **options)
    alone = [
        lab.train("alone-a", seed=3, **options),
        lab.train("alone-b", seed=3, **options | {"data": other}),
    ]

    for lane, result, single in zip(lanes, results, alone, strict=True):
        assert (result.name, result.steps, result.fate) == (lane.name, 5, "finished")
        assert result.parameters == single.parameters
        together, apart = lab.root / "together" / lane.name, lab.root / f"alone-{lane.name}"
        assert losses(together) == pytest.approx(losses(apart), rel=1e-4)
        assert_same_adapter(together, apart)
        record = json.loads((together / "training.json").read_text())
        assert record["lane"]["seed"] == lane.seed
        assert record["result"]["fate"] == "finished"
        assert record["environment"]["torch"]
        assert (together / "loss.png").exists()


def test_a_lane_that_diverges_stops_alone_and_says_so(lab: Lab) -> None:
    lanes = [Lane("good", 1), Lane("bad", 2, lr=EXPLODING), Lane("also-good", 3)]
    options: dict[str, Any] = {"method": "lora", "steps": 6, "warmup": 0.0, "eval_data": lab.data}
    results = lab.train_lanes("run", lanes, **options)
    lab.train("alone", seed=1, **options)

    good, bad, _ = results
    assert [result.fate for result in results] == ["finished", "diverged", "finished"]
    assert all(result.finished for result in results)
    assert bad.error is not None
    assert "a lower lr" in bad.error
    assert bad.steps < good.steps == 6
    text = (lab.root / "run" / "bad" / "metrics.jsonl").read_text().splitlines()
    last = json.loads(text[-1], parse_constant=pytest.fail)  # NaN is no JSON
    assert last["error"] == bad.error
    assert not (lab.root / "run" / "bad" / TENSORS).exists()
    assert_same_adapter(lab.root / "run" / "good", lab.root / "alone")


def test_a_run_whose_lanes_have_all_diverged_fails(lab: Lab) -> None:
    lanes = [Lane("one", 1), Lane("two", 2)]
    with pytest.raises(Diverged):
        lab.train_lanes("run", lanes, method="lora", lr=EXPLODING, warmup=0.0, steps=9)
    text = (lab.root / "run" / "two" / "training.json").read_text()
    record = json.loads(text, parse_constant=pytest.fail)  # NaN is no JSON
    assert record["result"]["fate"] == "diverged"


def test_divergence_says_what_is_not_finite() -> None:
    assert str(Diverged(3, math.inf)).startswith("the loss at step 3 is inf: it must stay finite")
    assert str(Diverged(3, 2.5)).startswith("the gradient at step 3 is not finite")


def test_early_stopping_keeps_the_best_values_of_each_lane(
    lab: Lab, write_lines: Callable[..., Path]
) -> None:
    # What is measured is not what is learnt: it gets better for a while, then worse.
    measured = write_lines('{"prompt": "ab", "completion": "zzzzzz"}')
    options: dict[str, Any] = {
        "method": "lora", "schedule": "constant", "warmup": 0.0, "eval_data": measured,
        "eval_every": 2,
    }  # fmt: skip
    lanes = [Lane("fast", 1, lr=0.05), Lane("still", 2, lr=1e-7)]
    results = lab.train_lanes("run", lanes, steps=30, patience=2, **options)

    fast = results[0]
    evals = read_evals(lab.root / "run" / "fast" / "eval.jsonl")
    best = min(evals, key=lambda point: point.loss)
    assert fast.fate == "patience"
    assert fast.finished
    assert (fast.best_step, fast.best_loss) == (best.step, best.loss)
    assert fast.steps == evals[-1].step == best.step + 4 < 30
    # With a constant rate, a run that ends at the best step has the values that were kept.
    assert best.step > 0
    lab.train_lanes("short", lanes, steps=best.step, **options)
    kept, short = (lab.root / run / "fast" / TENSORS for run in ("run", "short"))
    assert kept.read_bytes() == short.read_bytes()


def test_the_best_values_survive_an_interruption(
    lab: Lab, write_lines: Callable[..., Path]
) -> None:
    options: dict[str, Any] = {
        "method": "lora", "steps": 30, "schedule": "constant", "warmup": 0.0, "eval_every": 2,
        "patience": 2, "eval_data": write_lines('{"prompt": "ab", "completion": "zzzzzz"}'),
    }  # fmt: skip
    lanes = [Lane("fast", 1, lr=0.05)]
    [whole] = lab.train_lanes("whole", lanes, **options)
    assert whole.best_step is not None
    later = whole.best_step + 1

    def interrupt(done: StepMetrics) -> None:
        if done.step == later:
            signal.raise_signal(signal.SIGTERM)

    [stopped] = lab.train_lanes("parts", lanes, interrupt, **options)
    assert (stopped.finished, stopped.steps) == (False, later)
    [resumed] = lab.train_lanes("parts", lanes, resume=True, **options)
    assert (resumed.fate, resumed.steps) == ("patience", whole.steps)
    kept = [(lab.root / run / "fast" / TENSORS).read_bytes() for run in ("whole", "parts")]
    assert kept[0] == kept[1]


def test_best_so_far_counts_what_is_no_better() -> None:
    best = BestSoFar()
    nan = float("nan")
    offers = [(0, 3.0), (5, 2.0), (10, 2.0), (15, nan)]
    assert [best.offer(step, loss) for step, loss in offers] == [True, True, False, False]
    assert (best.step, best.loss, best.worse) == (5, 2.0, 2)
    assert best.exhausted(2)
    assert not best.exhausted(3)
    assert not best.exhausted(None)


def test_looking_at_steps_later_changes_nothing_but_when(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    lanes = [Lane("good", 1), Lane("bad", 2, lr=EXPLODING)]
    options: dict[str, Any] = {
        "method": "lora", "steps": 7, "warmup": 0.0, "save_every": 3, "eval_data": lab.data,
    }  # fmt: skip
    lab.train_lanes("prompt", lanes, **options)
    monkeypatch.setattr(loop, "OutcomeReader", lambda device, lag: OutcomeReader(device, 2))
    lab.train_lanes("late", lanes, **options)

    for name in ("good", "bad"):
        late, prompt = lab.root / "late" / name, lab.root / "prompt" / name
        for log in ("metrics.jsonl", "eval.jsonl"):
            ours, theirs = ((run / log).read_text().splitlines() for run in (late, prompt))
            assert len(ours) == len(theirs)
        assert losses(late)[:-1] == losses(prompt)[:-1]
    good = [lab.root / run / "good" / TENSORS for run in ("late", "prompt")]
    assert good[0].read_bytes() == good[1].read_bytes()


def test_lanes_of_seeds_have_their_names(lab: Lab) -> None:
    assert lanes_of(lab.config("run")) == []
    assert lanes_of(lab.config("run", seeds=(4, 2))) == [Lane("seed-4", 4), Lane("seed-2", 2)]
    with pytest.raises(OptionRejected, match="needs a lane for each"):
        lab.train("run", seeds=(1, 2))


@pytest.mark.parametrize(
    ("lanes", "rule"),
    [
        ([Lane("a", 1), Lane("a", 2)], "names a lane twice"),
        ([Lane("checkpoint", 1)], "is no name"),
        ([Lane("../a", 1)], "is no name"),
        ([Lane("", 1)], "is no name"),
        ([Lane("a", 1, lr=0.0)], "must be positive"),
    ],
)
def test_lanes_that_cannot_be_are_refused(lanes: list[Lane], rule: str, lab: Lab) -> None:
    with pytest.raises(OptionRejected, match=rule):
        lab.train_lanes("run", lanes)
    assert not (lab.root / "run").exists()


def test_a_run_is_resumed_with_the_same_lanes_only(lab: Lab) -> None:
    lab.train_lanes("run", [Lane("a", 1), Lane("b", 2)], steps=2)
    with pytest.raises(ResumeMismatch, match="lanes is"):
        lab.train_lanes("run", [Lane("a", 1), Lane("b", 3)], steps=2, resume=True)
    with pytest.raises(ResumeMismatch):
        lab.train("run", steps=2, resume=True)
    lab.train_lanes("run", [Lane("a", 1), Lane("b", 2)], steps=2, resume=True)
