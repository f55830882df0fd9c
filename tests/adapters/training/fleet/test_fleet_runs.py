"""Whole fleets on the tiny base: each tenant gets the adapter that it would get alone."""

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from safetensors.torch import load_file

from shoal.adapters.training.config import TrainConfig
from shoal.adapters.training.errors import (
    DataRejected,
    OptionRejected,
    ResumeMismatch,
    RunDirectoryError,
    TrainingError,
)
from shoal.adapters.training.fleet import loop
from shoal.adapters.training.fleet.loop import FleetStepMetrics
from shoal.adapters.training.fleet.members import Member
from shoal.adapters.training.fleet.trainer import FleetResult
from shoal.adapters.training.metrics import read_evals, read_steps
from shoal.adapters.training.rundir import claimed


class FleetLab(Protocol):
    """The fixture of this folder's conftest.py."""

    base: Path
    root: Path

    def tasks(self, *tenants: dict[str, Any], name: str = ...) -> Path: ...
    def data(self, name: str, number: int) -> Path: ...
    def common(self, out: str, **options: Any) -> TrainConfig: ...
    def fleet(self, tasks: Path, out: str = ..., **options: Any) -> FleetResult: ...
    def alone(self, out: str, **options: Any) -> None: ...


def adapter(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def adapter_bytes(directory: Path) -> bytes:
    return (directory / "adapter_model.safetensors").read_bytes()


def losses(directory: Path) -> list[float]:
    return [step.loss for step in read_steps(directory / "metrics.jsonl")]


def interrupt_after(step: int) -> Callable[[FleetStepMetrics], None]:
    """As a user who presses Ctrl-C during this step."""

    def on_step(done: FleetStepMetrics) -> None:
        if done.step == step:
            signal.raise_signal(signal.SIGINT)

    return on_step


def crash_after(step: int) -> Callable[[FleetStepMetrics], None]:
    """As a machine that stops after this step."""

    def on_step(done: FleetStepMetrics) -> None:
        if done.step == step:
            raise RuntimeError("power cut")

    return on_step


# Unequal data, seeds, rates, steps and batches.
UNEQUAL: tuple[dict[str, Any], ...] = (
    {"name": "ann", "seed": 3},
    {"name": "bob", "seed": 4, "lr": 0.01, "batch_size": 3},
    {"name": "cem", "seed": 3, "steps": 17},
    {"name": "dee", "seed": 9, "lr": 0.05, "batch_size": 1},
    {"name": "eve", "owner": "acme", "seed": 1},
)
RATES = {"lora-xs": 0.02, "miss": 0.005}


def own_options(lab: FleetLab, tenant: dict[str, Any]) -> dict[str, Any]:
    mine = {key: tenant[key] for key in ("seed", "lr", "steps", "batch_size") if key in tenant}
    return {**mine, "data": lab.root / f"{tenant['name']}.jsonl"}


@pytest.mark.parametrize("method", ["lora-xs", "miss"])
def test_each_tenant_gets_the_adapter_that_it_would_get_alone(
    fleet_lab: FleetLab, method: str
) -> None:
    common = {"method": method, "steps": 20, "lr": RATES[method], "save_every": 9}
    scale = 0.25 if method == "miss" else 1.0
    tenants = [{**t, **({"lr": t["lr"] * scale} if "lr" in t else {})} for t in UNEQUAL]
    tasks = fleet_lab.tasks(*tenants)
    result = fleet_lab.fleet(tasks, **common)
    assert result.finished
    assert {(end.reference, end.fate) for end in result.tenants} == {
        ("ann", "finished"), ("bob", "finished"), ("cem", "finished"), ("dee", "finished"),
        ("acme/eve", "finished"),
    }  # fmt: skip
    for tenant in tenants:
        together = fleet_lab.root / "out" / tenant.get("owner", "") / tenant["name"]
        apart = fleet_lab.root / f"alone-{tenant['name']}"
        fleet_lab.alone(apart.name, **{**common, **own_options(fleet_lab, tenant)})
        mine, theirs = adapter(together), adapter(apart)
        assert mine.keys() == theirs.keys()
        for name, values in theirs.items():
            assert (mine[name] - values).abs().max() < 1e-3, name
        moved = max(
            float(values.abs().max()) for name, values in theirs.items() if "robe" not in name
        )
        assert moved > 0.01  # there was something to learn
        assert losses(together) == pytest.approx(losses(apart), rel=1e-3, abs=1e-4)
        config = "adapter_config.json"
        assert (together / config).read_text() == (apart / config).read_text()


@pytest.mark.parametrize(
    "options", [{"vectors": "bottom"}, {"no_sigma": True}, {"format": "official"}], ids=str
)
def test_forms_of_lora_xs_are_those_of_a_plain_run(
    fleet_lab: FleetLab, options: dict[str, Any]
) -> None:
    tasks = fleet_lab.tasks({"name": "first"}, {"name": "a", "seed": 3})
    common: dict[str, Any] = {"lr": 0.02, "steps": 5, "targets": ("q_proj", "down_proj")}
    fleet_lab.fleet(tasks, **common, **options)
    fleet_lab.alone("alone", **common, **options, seed=3, data=fleet_lab.root / "a.jsonl")
    mine, theirs = adapter(fleet_lab.root / "out/a"), adapter(fleet_lab.root / "alone")
    assert mine.keys() == theirs.keys()
    for name, values in theirs.items():
        torch.testing.assert_close(mine[name], values, atol=1e-4, rtol=1e-3)


def test_tenants_that_take_turns_and_wait_get_the_same_adapters(fleet_lab: FleetLab) -> None:
    tasks = fleet_lab.tasks(*({"name": f"t{i}", "seed": i, "steps": 4 + i % 3} for i in range(7)))
    seen: list[FleetStepMetrics] = []
    fleet_lab.fleet(tasks, "all", lr=0.02)
    result = fleet_lab.fleet(tasks, "turns", lr=0.02, rows=4, resident=3, on_step=seen.append)
    assert result.resident == 3
    assert {done.tenants for done in seen} <= {1, 2}
    assert max(done.resident for done in seen) == 3
    assert [end.reference for end in result.tenants][:2] == ["t0", "t1"]  # who began first
    for i in range(7):
        mine, theirs = (adapter(fleet_lab.root / out / f"t{i}") for out in ("turns", "all"))
        for name, values in theirs.items():
            torch.testing.assert_close(mine[name], values, atol=1e-5, rtol=1e-4)


def test_an_interrupted_fleet_goes_on_bit_for_bit(fleet_lab: FleetLab) -> None:
    tasks = fleet_lab.tasks(*({"name": f"t{i}", "seed": i, "steps": 3 + i} for i in range(5)))
    options = {"rows": 4, "resident": 3, "lr": 0.05, "weight_decay": 0.1}
    fleet_lab.fleet(tasks, "whole", **options)
    stopped = fleet_lab.fleet(tasks, "parts", **options, on_step=interrupt_after(6))
    assert not stopped.finished
    again = fleet_lab.fleet(tasks, "parts", **options, resume=True)
    assert again.finished
    assert sorted(end.reference for end in again.tenants) == [f"t{i}" for i in range(5)]
    for i in range(5):
        whole, parts = fleet_lab.root / "whole" / f"t{i}", fleet_lab.root / "parts" / f"t{i}"
        assert adapter_bytes(parts) == adapter_bytes(whole)
        assert losses(parts) == losses(whole)
    lines = (fleet_lab.root / "parts/_fleet/results.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["reference"] for line in lines) == [f"t{i}" for i in range(5)]


def test_a_crashed_fleet_goes_on_from_its_last_checkpoint(fleet_lab: FleetLab) -> None:
    measured = {"eval_data": "t0.jsonl"}
    tasks = fleet_lab.tasks(*({"name": f"t{i}", "steps": 3 + i, **measured} for i in range(4)))
    options = {"rows": 4, "resident": 2, "lr": 0.05, "save_every": 3, "eval_every": 2}
    fleet_lab.fleet(tasks, "whole", **options)
    with pytest.raises(RuntimeError, match="power cut"):
        fleet_lab.fleet(tasks, "parts", **options, on_step=crash_after(8))
    fleet_lab.fleet(tasks, "parts", **options, resume=True)
    for i in range(4):
        whole, parts = fleet_lab.root / "whole" / f"t{i}", fleet_lab.root / "parts" / f"t{i}"
        assert adapter_bytes(parts) == adapter_bytes(whole)
        steps = [step.step for step in read_steps(parts / "metrics.jsonl")]
        assert steps == list(range(1, 4 + i))
        assert read_evals(parts / "eval.jsonl") == read_evals(whole / "eval.jsonl")


def test_looking_at_a_step_late_changes_nothing(
    fleet_lab: FleetLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a device that works by itself: one step is launched while another is looked at."""
    tenants = [{"name": f"t{i}", "seed": i, "steps": 5 + i} for i in range(4)]
    tenants[2] |= {"eval_data": "t0.jsonl"}
    tasks = fleet_lab.tasks(*tenants, {"name": "wild", "lr": 1e30})
    options: dict[str, Any] = {"rows": 6, "resident": 4, "lr": 0.02, "method": "miss"}
    options |= {"warmup": 0.0, "eval_every": 3, "save_every": 4}
    fleet_lab.fleet(tasks, "whole", **options)
    monkeypatch.setattr(loop, "lag_of", lambda device: 1)
    late = fleet_lab.fleet(tasks, "late", **options)
    assert {e.reference: e.fate for e in late.tenants}.pop("wild") == "diverged"
    stopped = fleet_lab.fleet(tasks, "parts", **options, on_step=interrupt_after(5))
    assert not stopped.finished
    fleet_lab.fleet(tasks, "parts", **options, resume=True)
    for i in range(4):
        whole, *others = (fleet_lab.root / out / f"t{i}" for out in ("whole", "late", "parts"))
        for other in others:
            assert adapter_bytes(other) == adapter_bytes(whole)
            assert losses(other) == losses(whole)
    whole, other = (read_evals(fleet_lab.root / o / "t2/eval.jsonl") for o in ("whole", "late"))
    assert whole == other


def test_no_checkpoint_is_passed_over_when_steps_are_looked_at_late(
    fleet_lab: FleetLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "lag_of", lambda device: 1)
    saved: list[int] = []
    save = loop.FleetLoop.save

    def noting(self: loop.FleetLoop, finishing: Any) -> None:
        saved.append(self.step)
        save(self, finishing)

    monkeypatch.setattr(loop.FleetLoop, "save", noting)
    fleet_lab.fleet(fleet_lab.tasks({"name": "a"}, {"name": "b"}), steps=12, save_every=4)
    assert saved == [4, 8, 12]


def test_tenants_may_be_added_to_an_interrupted_fleet_but_not_changed(fleet_lab: FleetLab) -> None:
    first = [{"name": "a"}, {"name": "b", "steps": 9}]
    tasks = fleet_lab.tasks(*first)
    fleet_lab.fleet(tasks, on_step=interrupt_after(2))
    with pytest.raises(ResumeMismatch, match="tenant b has other options or data"):
        fleet_lab.fleet(fleet_lab.tasks(first[0], {**first[1], "steps": 8}), resume=True)
    with pytest.raises(ResumeMismatch, match="tenant b is no longer there"):
        fleet_lab.fleet(fleet_lab.tasks(first[0]), resume=True)
    with pytest.raises(ResumeMismatch, match=r"rank is 8, in .* it was 4"):
        fleet_lab.fleet(fleet_lab.tasks(*first), resume=True, rank=8)
    result = fleet_lab.fleet(fleet_lab.tasks(*first, {"name": "c"}), resume=True)
    assert [end.reference for end in result.tenants] == ["a", "b", "c"]


def test_what_decides_who_stops_early_must_stay(fleet_lab: FleetLab) -> None:
    fleet_lab.data("other", 3)
    tenant = {"name": "a", "steps": 9, "eval_data": "other.jsonl"}
    tasks = fleet_lab.tasks(tenant, {"name": "b"})
    options: dict[str, Any] = {"patience": 2, "eval_every": 2}
    fleet_lab.fleet(tasks, on_step=interrupt_after(2), **options)
    for changed in ({"patience": 3}, {"eval_every": 3}):
        with pytest.raises(ResumeMismatch, match="tenant a has other options or data"):
            fleet_lab.fleet(tasks, resume=True, **options | changed)
    fleet_lab.data("other", 4)
    with pytest.raises(ResumeMismatch, match="tenant a has other options or data"):
        fleet_lab.fleet(tasks, resume=True, **options)
    fleet_lab.data("other", 3)
    assert fleet_lab.fleet(tasks, resume=True, **options).finished


def test_a_tenant_with_evaluations_may_join_a_fleet_that_had_none(fleet_lab: FleetLab) -> None:
    first = [{"name": "a", "steps": 9}, {"name": "b"}]
    fleet_lab.fleet(fleet_lab.tasks(*first), "parts", on_step=interrupt_after(3), patience=2)
    third = {"name": "c", "eval_data": "a.jsonl"}
    tasks = fleet_lab.tasks(*first, third)
    fleet_lab.fleet(tasks, "parts", patience=2, resume=True)
    # Again with nobody left in a slot, and with a tenant more.
    tasks = fleet_lab.tasks(*first, third, {"name": "d", "eval_data": "b.jsonl"})
    result = fleet_lab.fleet(tasks, "parts", patience=2, resume=True)
    assert [end.reference for end in result.tenants] == ["b", "a", "c", "d"]
    fleet_lab.fleet(tasks, "whole", patience=2, resident=2)
    for name in "abcd":
        parts, whole = fleet_lab.root / "parts" / name, fleet_lab.root / "whole" / name
        for key, values in adapter(whole).items():
            torch.testing.assert_close(adapter(parts)[key], values, atol=1e-5, rtol=1e-4)


def test_a_tenant_never_gets_the_best_values_of_the_one_before_it(
    fleet_lab: FleetLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even when none of its own evaluations is a number."""
    tenants = [{"name": n, "eval_data": "a.jsonl", "seed": i} for i, n in enumerate("ab")]
    tasks = fleet_lab.tasks(*tenants)
    offer = Member.note_evaluation

    def nan_for_b(self: Member, loss: float) -> bool:
        return offer(self, math.nan if self.tenant.name == "b" else loss)

    monkeypatch.setattr(Member, "note_evaluation", nan_for_b)
    result = fleet_lab.fleet(tasks, resident=1, patience=50, lr=0.1, eval_every=2)
    assert [end.reference for end in result.tenants] == ["a", "b"]
    fleet_lab.fleet(fleet_lab.tasks(tenants[1], name="b.tasks"), "one", steps=1, lr=1e-12)
    start, mine = (adapter(fleet_lab.root / out / "b") for out in ("one", "out"))
    for name, values in start.items():
        torch.testing.assert_close(mine[name], values, atol=1e-9, rtol=0)


def test_a_tenant_that_gets_no_better_stops_early_with_its_best_values(
    fleet_lab: FleetLab,
) -> None:
    fleet_lab.data("other", 3)
    options: dict[str, Any] = {"steps": 40, "lr": 0.3, "eval_every": 2}
    tenant = {"name": "early", "eval_data": "other.jsonl", "seed": 1}
    tasks = fleet_lab.tasks({"name": "plain", "steps": 6}, tenant)
    result = fleet_lab.fleet(tasks, patience=2, **options)
    ends = {end.reference: end for end in result.tenants}
    assert ends["early"].fate == "patience"
    assert ends["early"].steps < 40
    assert ends["plain"].fate == "finished"
    evals = read_evals(fleet_lab.root / "out/early/eval.jsonl")
    assert min(e.loss for e in evals) == ends["early"].eval_loss
    # As the plain trainer decides.
    data = {"data": fleet_lab.root / "early.jsonl", "eval_data": fleet_lab.root / "other.jsonl"}
    fleet_lab.alone("alone", **options, **data, patience=2, seed=1)
    alone = read_evals(fleet_lab.root / "alone/eval.jsonl")
    assert [e.step for e in evals] == [e.step for e in alone]
    assert [e.loss for e in evals] == pytest.approx([e.loss for e in alone], rel=1e-3)
    mine, theirs = adapter(fleet_lab.root / "out/early"), adapter(fleet_lab.root / "alone")
    for name, values in theirs.items():
        torch.testing.assert_close(mine[name], values, atol=1e-3, rtol=1e-3)


def test_a_tenant_that_diverges_stops_alone(fleet_lab: FleetLab) -> None:
    good: dict[str, Any] = {"name": "good", "seed": 5, "steps": 8}
    tasks = fleet_lab.tasks(good, {"name": "wild", "lr": 1e30, "steps": 8})
    result = fleet_lab.fleet(tasks, method="miss", warmup=0.0)
    ends = {end.reference: end for end in result.tenants}
    assert (ends["wild"].fate, ends["good"].fate) == ("diverged", "finished")
    assert not (fleet_lab.root / "out/wild/adapter_model.safetensors").exists()
    assert "a lower lr" in (fleet_lab.root / "out/wild/metrics.jsonl").read_text()
    fleet_lab.fleet(fleet_lab.tasks(good, name="one.jsonl"), "one", method="miss", warmup=0.0)
    mine, alone = (adapter(fleet_lab.root / out / "good") for out in ("out", "one"))
    for name, values in alone.items():
        torch.testing.assert_close(mine[name], values, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{}"], 'line 1: "name" and "owner" must be strings'),
        (["[]"], "line 1: must be a JSON object"),
        (["nonsense"], "line 1: is not JSON"),
        (['{"name": "a"}'], 'line 1: "data" is missing'),
        (['{"name": "A b", "data": "d"}'], "line 1: adapter name 'A b' must be"),
        (['{"name": "a", "data": "d", "rank": 4}'], "line 1: 'rank' is none of name, data"),
        (['{"name": "a", "data": "d", "steps": 1.5}'], 'line 1: "steps" must be a whole number'),
        (['{"name": "a", "data": "d", "lr": -1}'], "line 1: lr is -1.0: must be a positive"),
        (['{"name": "a", "data": "d", "steps": true}'], 'line 1: "steps" must be a whole'),
        (['{"name": "a", "data": "d", "batch_size": 17}'], "line 1: batch_size is 17: a step has"),
        (['{"name": "a", "data": "d", "tags": {"K": "v"}}'], "line 1: tag 'K'"),
        (['{"name": "a", "data": "d", "owner": "?"}'], "line 1: owner"),
        (['{"name": "a", "data": "d"}', '{"name": "a", "data": "d"}'], "line 2: a is already on"),
        (
            ['{"name": "a", "data": "d"}', '{"name": "b", "owner": "a", "data": "d"}'],
            "line 1: a is an owner too",
        ),
        ([""], "names no tenants"),
    ],
)
def test_a_line_that_breaks_a_rule_is_named_before_anything_starts(
    fleet_lab: FleetLab, lines: list[str], message: str
) -> None:
    tasks = fleet_lab.root / "tasks.jsonl"
    tasks.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataRejected) as refused:
        fleet_lab.fleet(tasks)
    assert str(tasks) in str(refused.value)
    assert message in str(refused.value)
    assert not (fleet_lab.root / "out").exists()


def test_a_tenant_with_bad_data_is_refused_with_file_and_line(fleet_lab: FleetLab) -> None:
    tasks = fleet_lab.tasks({"name": "good"}, {"name": "bad"})
    bad = fleet_lab.root / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": 3}\n')
    with pytest.raises(DataRejected, match=r"bad\.jsonl, line 2: "):
        fleet_lab.fleet(tasks)
    bad.write_text(json.dumps({"prompt": "a" * 50, "completion": "b"}) + "\n")
    with pytest.raises(DataRejected, match=r"bad\.jsonl, line 1: .* none to learn within"):
        fleet_lab.fleet(tasks, max_length=20)
    bad.unlink()
    with pytest.raises(DataRejected, match=r"bad\.jsonl: cannot be read"):
        fleet_lab.fleet(tasks)
    assert not (fleet_lab.root / "out").exists()


def test_what_a_fleet_cannot_do_is_refused_by_name(fleet_lab: FleetLab) -> None:
    tasks = fleet_lab.tasks({"name": "a"})
    refused: list[tuple[str, dict[str, Any]]] = [
        ("method is lora: a fleet trains lora-xs, miss", {"method": "lora"}),
        ("accumulate is 2: is not for fleets", {"accumulate": 2}),
        ("pack is True: is not for fleets", {"pack": True}),
        ("rows is 1: must be at least batch-size, 2", {"rows": 1}),
        ("method is lora-xs: with these options", {"init": "random"}),
        ("method is miss: with these options", {"method": "miss", "shard": "output"}),
        ("resident is 0: must be at least 1", {"resident": 0}),
        ("rank is 17: must not exceed 16", {"rank": 17}),
    ]
    for message, options in refused:
        with pytest.raises(OptionRejected, match=message):
            fleet_lab.fleet(tasks, **options)
    assert not (fleet_lab.root / "out").exists()


def test_a_directory_in_use_is_refused_and_overwritten_when_asked_to(fleet_lab: FleetLab) -> None:
    tasks = fleet_lab.tasks({"name": "a"})
    with pytest.raises(RunDirectoryError, match="no fleet's checkpoint"):
        fleet_lab.fleet(tasks, resume=True)
    with claimed(fleet_lab.root / "out"), pytest.raises(RunDirectoryError, match="is in use"):
        fleet_lab.fleet(tasks)
    fleet_lab.fleet(tasks, lr=0.01)
    with claimed(fleet_lab.root / "out"), pytest.raises(RunDirectoryError, match="is in use"):
        fleet_lab.fleet(tasks, resume=True, lr=0.01)
    torn = fleet_lab.root / "out/_fleet/.state.safetensors.x_1a2b3c"
    torn.write_bytes(b"half")
    fleet_lab.fleet(tasks, resume=True, lr=0.01)
    assert not torn.exists()
    first = adapter_bytes(fleet_lab.root / "out/a")
    with pytest.raises(TrainingError, match="is not empty"):
        fleet_lab.fleet(tasks)
    fleet_lab.fleet(tasks, overwrite=True, lr=0.05)
    assert adapter_bytes(fleet_lab.root / "out/a") != first
    assert len(losses(fleet_lab.root / "out/a")) == 6
    (fleet_lab.root / "out/_fleet/state.safetensors").write_bytes(b"nonsense")
    with pytest.raises(RunDirectoryError, match="is not a fleet's checkpoint"):
        fleet_lab.fleet(tasks, resume=True, lr=0.05)
