"""Whole runs on the tiny base: what they learn, write, refuse, and how they go on."""

import dataclasses
import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from shoal.adapters.base import base_digest
from shoal.adapters.basis import DEFAULT_RANK, Basis, BasisStore, canonical_basis
from shoal.adapters.reading import adapter_files, read_adapter
from shoal.adapters.spec import Target
from shoal.adapters.training.config import MethodName, TrainConfig
from shoal.adapters.training.data import Example, collate
from shoal.adapters.training.errors import (
    Diverged,
    OptionRejected,
    ResumeMismatch,
    RunDirectoryError,
    TrainingError,
)
from shoal.adapters.training.inputs import step_inputs
from shoal.adapters.training.loop import OnStep, TrainingLoop
from shoal.adapters.training.loss import LaneLoss
from shoal.adapters.training.methods.attaching import shape_of, weight_reader
from shoal.adapters.training.methods.source import Source
from shoal.adapters.training.methods.table import attach_all
from shoal.adapters.training.metrics import StepMetrics, read_evals, read_steps
from shoal.adapters.training.schedule import learning_rate
from shoal.adapters.training.trainer import TrainResult
from shoal.adapters.weights import AdapterWeights

# Options under which the tiny base memorises its data, by method.
LEARNING: dict[MethodName, dict[str, Any]] = {
    "lora-xs": {"lr": 0.05, "rank": 8},
    "miss": {"lr": 0.02},
    "lora": {"lr": 0.03},
}


class Lab(Protocol):
    """The fixture of this folder's conftest.py."""

    base: Path
    root: Path

    def config(self, name: str, **options: Any) -> TrainConfig: ...
    def train(self, name: str, on_step: OnStep | None = None, **options: Any) -> TrainResult: ...


def interrupt_after(step: int) -> Callable[[StepMetrics], None]:
    """As a user who presses Ctrl-C during this step."""

    def on_step(done: StepMetrics) -> None:
        if done.step == step:
            signal.raise_signal(signal.SIGINT)

    return on_step


def crash_after(step: int) -> Callable[[StepMetrics], None]:
    """As a machine that stops after this step."""

    def on_step(done: StepMetrics) -> None:
        if done.step == step:
            raise RuntimeError("power cut")

    return on_step


def losses(directory: Path) -> list[float]:
    return [step.loss for step in read_steps(directory / "metrics.jsonl")]


def adapter_bytes(directory: Path) -> bytes:
    return (directory / "adapter_model.safetensors").read_bytes()


def read_back(lab: Lab, name: str) -> tuple[AdapterWeights, nn.Module, Basis]:
    """The adapter as a server reads it, the plain base, and the canonical basis."""
    model = AutoModelForCausalLM.from_pretrained(lab.base)
    shape = shape_of(model, lab.base.stem, base_digest(lab.base))
    weight_of = weight_reader(model)
    canonical = canonical_basis(weight_of, shape, DEFAULT_RANK, lab.root / "bases")
    weights = read_adapter(
        adapter_files(lab.root / name),
        shape=shape,
        weight_of=weight_of,
        bases=BasisStore(lab.root / "uploaded"),
        canonical=canonical,
        max_bytes=1 << 22,
        max_bases=2,
    )
    return weights, model, canonical


def delta_of(weights: AdapterWeights, target: Target, weight: Tensor, basis: Basis) -> Tensor:
    """``ΔW`` in float64 by the formulas of the three families."""
    parts = [part.double() for part in weights.tensors[target]]
    if weights.family == "core":
        [core] = parts
        b = basis.factors[target][:, : core.shape[0]].double()
        delta = b @ core @ b.T @ weight.double()
    elif weights.family == "fold":
        [block] = parts
        columns = torch.arange(weight.shape[1]) % block.shape[0]
        delta = block[columns].T
    else:
        delta = parts[1] @ parts[0]
    return weights.scales[target] * delta


def merged_logits(lab: Lab, name: str, ids: Tensor) -> Tensor:
    """The base's logits in float64 with the saved adapter merged into its weights."""
    weights, model, basis = read_back(lab, name)
    model.double()
    weight_of = weight_reader(model)
    with torch.no_grad():
        for target in weights.tensors:
            weight = weight_of(target)
            weight += delta_of(weights, target, weight, basis)
        logits: Tensor = model(input_ids=ids).logits
    return logits


@pytest.mark.parametrize("method", LEARNING)
def test_a_run_memorises_its_data_and_saves_what_it_learnt(method: MethodName, lab: Lab) -> None:
    before = base_digest(lab.base)
    result = lab.train("run", method=method, steps=40, alpha=None, **LEARNING[method])

    learnt = losses(lab.root / "run")
    assert result.finished
    assert result.steps == len(learnt) == 40
    assert learnt[-1] == result.loss
    assert sum(learnt[-5:]) < 0.5 * sum(learnt[:5])
    assert base_digest(lab.base) == before
    # The saved adapter, merged into the base, has the loss that training ended with.
    rows = torch.tensor([[5, 9, 3, 8, 2, 7, 40, 41]])
    plain = AutoModelForCausalLM.from_pretrained(lab.base).double()
    with torch.no_grad():
        changed = (merged_logits(lab, "run", rows) - plain(input_ids=rows).logits).abs().max()
    assert changed > 0.1


@pytest.mark.parametrize("method", LEARNING)
def test_the_adapter_read_back_gives_the_logits_of_the_trained_model(
    method: MethodName, lab: Lab
) -> None:
    options = LEARNING[method] | ({} if method == "miss" else {"alpha": 12.0})
    lab.train("run", method=method, steps=6, **options)

    # The trained model itself, restored from the checkpoint into fresh wrappers.
    config = lab.config("run", method=method, steps=6, **options)
    model = AutoModelForCausalLM.from_pretrained(lab.base)
    shape = shape_of(model, lab.base.stem, base_digest(lab.base))
    adapted = attach_all(model, config, Source(weight_reader(model), shape, lab.root / "bases"))
    saved = load_file(lab.root / "run" / "checkpoint" / "state.safetensors")
    with torch.no_grad():
        for target, linear in adapted.items():
            for name, factor in linear.factors().items():
                factor.copy_(saved[f"value.{target}.{name}"])
        ids = torch.arange(20).reshape(2, 10)
        trained = model.double()(input_ids=ids).logits

    torch.testing.assert_close(merged_logits(lab, "run", ids), trained, atol=1e-6, rtol=1e-6)


def test_the_official_layout_holds_the_same_adapter_as_the_compact_one(lab: Lab) -> None:
    for name in ("compact", "official"):
        lab.train(name, format=name, **LEARNING["lora-xs"])

    ids = torch.arange(20).reshape(2, 10)
    expected = merged_logits(lab, "compact", ids)
    torch.testing.assert_close(merged_logits(lab, "official", ids), expected, atol=1e-5, rtol=1e-5)
    for name in ("compact", "official"):
        tensors = load_file(lab.root / name / "adapter_model.safetensors")
        assert any("lora_A" in key for key in tensors) == (name == "official")


def test_the_config_names_the_basis_the_base_and_that_the_base_was_whole(lab: Lab) -> None:
    lab.train("run", alpha=8.0)
    config = json.loads((lab.root / "run" / "adapter_config.json").read_text())
    _, _, canonical = read_back(lab, "run")

    assert config["peft_type"] == "LORA_XS"
    assert (config["r"], config["lora_alpha"]) == (4, 8.0)
    assert config["basis"]["id"] == canonical.id
    assert config["basis"]["base_digest"] == base_digest(lab.base)
    assert config["base_correction"] is None


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(lab: Lab) -> None:
    options = {"steps": 9, "accumulate": 2, "weight_decay": 0.1, "lr": 0.05}
    lab.train("whole", **options)
    stopped = lab.train("parts", interrupt_after(4), **options)
    assert (stopped.steps, stopped.finished) == (4, False)
    finished = lab.train("parts", resume=True, **options)

    assert (finished.steps, finished.finished) == (9, True)
    assert losses(lab.root / "parts") == losses(lab.root / "whole")
    assert adapter_bytes(lab.root / "parts") == adapter_bytes(lab.root / "whole")


def test_a_crashed_run_goes_on_from_its_last_checkpoint(lab: Lab) -> None:
    lab.train("whole", steps=7, save_every=2)
    with pytest.raises(RuntimeError, match="power cut"):
        lab.train("parts", crash_after(5), steps=7, save_every=2)
    with (lab.root / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # a line that the crash cut short
    lab.train("parts", resume=True, steps=7, save_every=2)

    steps = read_steps(lab.root / "parts" / "metrics.jsonl")
    assert [step.step for step in steps] == list(range(1, 8))
    assert losses(lab.root / "parts") == losses(lab.root / "whole")
    assert adapter_bytes(lab.root / "parts") == adapter_bytes(lab.root / "whole")


def test_an_interrupted_run_has_an_adapter_already(lab: Lab) -> None:
    lab.train("run", interrupt_after(2))
    weights, _, _ = read_back(lab, "run")
    assert len(weights.tensors) == 14


def test_the_seed_decides_the_run(lab: Lab) -> None:
    for name, seed in (("first", 5), ("again", 5), ("other", 6)):
        lab.train(name, seed=seed)

    assert adapter_bytes(lab.root / "first") == adapter_bytes(lab.root / "again")
    assert adapter_bytes(lab.root / "first") != adapter_bytes(lab.root / "other")


def test_metrics_have_a_line_for_each_step_and_the_curve_is_a_png(lab: Lab) -> None:
    lab.train("run", steps=5, eval_data=lab.config("run").data, save_every=2)

    lines = [json.loads(x) for x in (lab.root / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert all(line["tokens_s"] > 0 and math.isfinite(line["loss"]) for line in lines)
    config = lab.config("run", steps=5)
    assert [line["lr"] for line in lines] == [learning_rate(config, step) for step in range(5)]
    assert [point.step for point in read_evals(lab.root / "run" / "eval.jsonl")] == [0, 2, 4, 5]
    assert (lab.root / "run" / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_accumulating_batches_is_the_same_as_one_larger_batch(lab: Lab) -> None:
    lab.train("large", batch_size=4, steps=3)
    lab.train("small", batch_size=2, accumulate=2, steps=3)
    assert losses(lab.root / "small") == pytest.approx(losses(lab.root / "large"), rel=1e-5)


def test_packed_rows_are_learnt_and_resumed(lab: Lab) -> None:
    options = {"pack": True, "max_length": 64, "steps": 30, "batch_size": 1, **LEARNING["lora"]}
    lab.train("whole", method="lora", **options)
    lab.train("parts", interrupt_after(7), method="lora", **options)
    lab.train("parts", method="lora", resume=True, **options)

    learnt = losses(lab.root / "whole")
    assert sum(learnt[-5:]) < 0.5 * sum(learnt[:5])
    assert adapter_bytes(lab.root / "parts") == adapter_bytes(lab.root / "whole")


def test_evaluations_come_when_they_are_asked_for(lab: Lab) -> None:
    data = lab.config("run").data
    lab.train("run", steps=5, eval_data=data, eval_every=3, save_every=2)
    assert [point.step for point in read_evals(lab.root / "run" / "eval.jsonl")] == [0, 3, 5]
    with pytest.raises(OptionRejected, match="needs eval-data"):
        lab.train("other", patience=2)


def test_padding_does_not_change_the_loss(lab: Lab) -> None:
    model = AutoModelForCausalLM.from_pretrained(lab.base)
    rows = [
        Example((5, 6, 7, 8, 9), (False, False, True, True, True)),
        Example((7, 8), (False, True)),
        Example((3, 4, 5), (False, False, True)),
    ]
    cpu = torch.device("cpu")
    loss = LaneLoss(model)

    def summed(examples: list[Example]) -> Tensor:
        [total] = loss(step_inputs(collate(examples, 0, cpu), [1]))
        return total

    with torch.no_grad():
        together = summed(rows)
        apart = [summed([row]) for row in rows]
        # By hand: the last row's only supervised token, given the two before it.
        logits = model(input_ids=torch.tensor([[3, 4, 5]])).logits
    assert float(together) == pytest.approx(float(sum(apart)), rel=1e-5)
    assert float(apart[2]) == pytest.approx(-float(logits[0, 1].log_softmax(0)[5]), rel=1e-5)


def test_the_learning_rate_rises_then_falls(lab: Lab) -> None:
    config = lab.config("run", steps=10, warmup=0.2, lr=1.0)
    rates = [learning_rate(config, step) for step in range(10)]

    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 0 < rates[-1] < 0.1
    linear = dataclasses.replace(config, schedule="linear")
    assert learning_rate(linear, 6) == pytest.approx(0.5)
    assert learning_rate(dataclasses.replace(config, schedule="constant"), 9) == 1.0


def test_a_directory_in_use_is_refused_and_left_as_it_was(lab: Lab) -> None:
    (lab.root / "run").mkdir()
    note = lab.root / "run" / "note.txt"
    note.write_text("mine")

    with pytest.raises(RunDirectoryError, match="is not empty: must be new or empty"):
        lab.train("run")
    assert [path.name for path in (lab.root / "run").iterdir()] == ["note.txt"]
    lab.train("run", overwrite=True, steps=1)
    assert note.read_text() == "mine"
    with pytest.raises(RunDirectoryError, match="is a file"):
        lab.train("run/note.txt")


def test_overwriting_starts_afresh(lab: Lab) -> None:
    lab.train("run", steps=3, eval_data=lab.config("run").data)
    lab.train("run", steps=2, overwrite=True)

    assert len(losses(lab.root / "run")) == 2
    assert not (lab.root / "run" / "eval.jsonl").exists()


def test_a_run_is_not_resumed_into_another(lab: Lab) -> None:
    with pytest.raises(RunDirectoryError, match="has no checkpoint to resume"):
        lab.train("run", resume=True)
    lab.train("run", interrupt_after(1))
    saved = (lab.root / "run" / "training.json").read_bytes()

    with pytest.raises(ResumeMismatch, match=r"lr is 0.5, in .* it was 0.002"):
        lab.train("run", resume=True, lr=0.5)
    lab.config("run").data.write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(ResumeMismatch, match="data_digest is"):
        lab.train("run", resume=True)
    assert (lab.root / "run" / "training.json").read_bytes() == saved
    assert len(losses(lab.root / "run")) == 1


def test_what_is_measured_may_change_unless_it_decides_when_to_stop(lab: Lab) -> None:
    other = lab.root / "other.jsonl"
    other.write_text('{"prompt": "a", "completion": "b"}\n')
    options: dict[str, Any] = {"eval_data": lab.config("run").data, "eval_every": 2, "patience": 3}
    lab.train("run", interrupt_after(1), **options)
    for changed in ({"eval_every": 3}, {"eval_data": other}, {"patience": 4}):
        with pytest.raises(ResumeMismatch, match=r"^(eval_every|eval_digest|patience) is"):
            lab.train("run", resume=True, **options | changed)
    assert lab.train("run", resume=True, **options).finished

    free = {"eval_data": other, "eval_every": 4, "save_every": 3}
    lab.train("free", interrupt_after(1), eval_data=lab.config("run").data)
    assert lab.train("free", resume=True, **free).finished


def test_a_damaged_checkpoint_is_refused(lab: Lab) -> None:
    lab.train("run", interrupt_after(1))
    checkpoint = lab.root / "run" / "checkpoint" / "state.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-9])

    with pytest.raises(RunDirectoryError, match="is not a checkpoint of this trainer"):
        lab.train("run", resume=True)


def test_a_loss_that_is_not_finite_ends_the_run(lab: Lab) -> None:
    with pytest.raises(Diverged, match="a lower lr"):
        lab.train("run", method="lora", lr=1e30, warmup=0.0, steps=20)


def test_refusals_leave_no_directory_behind(lab: Lab) -> None:
    with pytest.raises(OptionRejected, match="must not exceed 16"):
        lab.train("run", rank=17)
    with pytest.raises(TrainingError, match="does not exist"):
        lab.train("run", base=lab.root / "absent")
    with pytest.raises(TrainingError, match="cannot be loaded"):
        lab.train("run", base=lab.root)
    assert not (lab.root / "run").exists()


def test_an_interrupt_before_the_first_step_can_be_resumed(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"eval_data": lab.config("run").data, "steps": 3}
    lab.train("whole", **options)
    evaluate = TrainingLoop._evaluate

    def interrupted(self: Any, *arguments: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        evaluate(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoop, "_evaluate", interrupted)
        stopped = lab.train("run", **options)
    assert (stopped.steps, stopped.finished) == (0, False)
    lab.train("run", resume=True, **options)

    assert adapter_bytes(lab.root / "run") == adapter_bytes(lab.root / "whole")
    assert [point.step for point in read_evals(lab.root / "run" / "eval.jsonl")] == [0, 3]


def test_a_run_in_16_bits_uses_the_basis_that_everyone_has(lab: Lab) -> None:
    # Computed of rounded weights, it would be a basis that a float32 server does not know.
    lab.train("run", dtype="bfloat16", steps=1)
    (cached,) = (lab.root / "bases").glob("basis-*.safetensors")
    computed = cached.read_bytes()
    cached.unlink()
    read_back(lab, "run")
    assert cached.read_bytes() == computed
