"""Experiments that train: a table on the tiny base, scored by the engine; costs; the MLP."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from shoal.adapters.training.data import Example, load_examples
from shoal.adapters.training.experiments import choosing, controlled, running
from shoal.adapters.training.experiments.base import directory_of
from shoal.adapters.training.experiments.costs import measure_costs
from shoal.adapters.training.experiments.driver import Clock, work
from shoal.adapters.training.experiments.log import Log
from shoal.adapters.training.experiments.running import Lab
from shoal.adapters.training.experiments.settings import GRIDS, Setting
from shoal.adapters.training.experiments.tables import Table
from shoal.adapters.training.experiments.tasks import FORGETTING, TASKS, path_of
from shoal.server.evaluating.directories import open_source

SMALL = {"rank": 2, "batch_size": 2}


@pytest.fixture
def lab(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """Tasks of a few records that the tiny base can read."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg-cache"))
    data = tmp_path / "data"
    data.mkdir()
    for task in TASKS:
        for split in ("train", "valid", "test"):
            records = [
                {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
                for q, a in (("a", "b"), ("c", "d"), ("e", "f"))
            ]
            path_of(data, task, split).write_text("\n".join(map(json.dumps, records)))
    (data / FORGETTING).write_text(json.dumps({"text": "once upon a time"}))
    log = Log(tmp_path / "out" / "experiments.jsonl")
    return Lab(base, data, tmp_path / "out", tmp_path / "cache", "cpu", 4, (1, 2), log)


def test_tables_are_trained_scored_and_kept_in_the_log_alone(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(GRIDS, "miss", (1e-3, 0.02))  # type: ignore[arg-type]
    monkeypatch.setattr(choosing, "BEYOND", 0)
    tokenised: list[str] = []

    def load(path: Path, *args: Any, **options: Any) -> list[Example]:
        tokenised.append(path.name)
        return load_examples(path, *args, **options)

    monkeypatch.setattr(running, "load_examples", load)
    settings = Setting("MiSS", "miss", SMALL), Setting("LoRA", "lora", SMALL, lr=1e-3)
    tables = [Table(each.label, each.label, ((each, ("words",)),)) for each in settings]
    assert work(lab, tables, Clock(math.inf), open_source)
    assert sorted(tokenised) == ["words.train.jsonl", "words.valid.jsonl"]  # for three groups

    runs = list(lab.log.lines("run"))
    assert [(line["method"], line["seed"], line["lr"]) for line in runs] == [
        ("miss", 0, 1e-3), ("miss", 0, 0.02), ("miss", 1, 0.02), ("miss", 2, 0.02),
        ("lora", 1, 1e-3), ("lora", 2, 1e-3),
    ]  # fmt: skip
    for line in runs:
        assert line["parameters"] > 0
        assert line["final_loss"] < line["initial_loss"]
        assert {"step_ms", "peak_memory", "early_loss", "commit", "gpu", "torch"} <= line.keys()
    scores = lab.log.by_id("score")
    assert set(scores) == {line["id"] for line in runs[2:]} | {"base-words"}
    for score in scores.values():
        assert 0 <= score["accuracy"] <= 1
        assert score["forgetting_loss"] >= score["base_entropy"] - 1e-4
    assert scores["base-words"]["kl"] == pytest.approx(0, abs=1e-6)
    assert scores[runs[2]["id"]]["kl"] > 0
    assert not list((lab.out / "runs").iterdir())

    count = len(lab.log.path.read_text().splitlines())
    assert work(lab, tables, Clock(math.inf), open_source)
    assert len(lab.log.path.read_text().splitlines()) == count


def test_an_adapter_that_cannot_be_served_costs_the_others_nothing(lab: Lab) -> None:
    setting = Setting("LoRA", "lora", SMALL, lr=1e-3)
    table = Table("tiny", "Tiny", ((setting, ("words",)),))
    assert work(lab, [table], Clock(math.inf), None)
    broken, whole = lab.log.by_id("run").values()
    (lab.out / broken["directory"] / "adapter_config.json").write_text("{}")
    assert not work(lab, [table], Clock(math.inf), open_source)
    assert set(lab.log.by_id("score")) == {whole["id"], "base-words"}


def test_lanes_that_diverge_are_logged_and_the_others_counted(lab: Lab) -> None:
    setting = Setting("LoRA", "lora", {**SMALL, "schedule": "constant", "warmup": 0.0}, lr=1e30)
    table = Table("tiny", "Tiny", ((setting, ("words",)),))
    assert work(lab, [table], Clock(math.inf), None)
    assert [line.get("diverged") for line in lab.log.lines("run")] == [True, True]


def test_costs_are_measured_once(lab: Lab) -> None:
    settings = (Setting("MiSS", "miss", SMALL), Setting("PiSSA", "pissa", SMALL))
    assert measure_costs(lab, Clock(math.inf), settings)
    lines = lab.log.by_id("cost")
    assert [line["label"] for line in lines.values()][:2] == ["MiSS", "PiSSA"]
    for line in lines.values():
        assert line["init_seconds"] > 0
        assert line["step_ms"] > 0
        assert line["peak_memory"] > 0
    assert not measure_costs(lab, Clock(-math.inf), (*settings, Setting("SVF", "svf")))
    assert measure_costs(lab, Clock(math.inf), settings)
    assert len(list(lab.log.lines("cost"))) == len(lines)


@pytest.mark.parametrize("method", [controlled.FULL, *controlled.RANKS])
def test_each_method_adapts_the_mlp_with_as_many_values_as_it_should(method: str) -> None:
    values = {
        controlled.FULL: 2 * (64 * 64 + 64),
        "lora": 2 * 2 * 128,
        "vera": 2 * 128,
        "miss": 2 * 4 * 64,
        "pissa": 2 * 2 * 128,
        "dora": 2 * (128 + 64),
    }
    outcome = controlled.adapt(method, 44, epochs=20)
    again = controlled.adapt(method, 44, epochs=20)

    assert outcome.losses == again.losses
    assert len(outcome.losses) == 3
    assert outcome.losses[-1] < outcome.losses[0]
    # AdaLoRA starts with more than its rank's, and takes some away.
    assert outcome.parameters == values.get(method, outcome.parameters)


def test_a_base_that_is_a_directory_is_used_as_it_is(base: Path, tmp_path: Path) -> None:
    assert directory_of(base, tmp_path / "folder") == base
    assert not (tmp_path / "folder").exists()


@pytest.mark.model
def test_a_gguf_base_is_converted_once_and_stays_the_same(tmp_path: Path) -> None:
    from shoal.server.model.pull import smollm2_path

    made = directory_of(smollm2_path(), tmp_path / "base")
    stamp = (made / "model.safetensors").stat().st_mtime_ns
    assert directory_of(smollm2_path(), tmp_path / "base") == made
    assert (made / "model.safetensors").stat().st_mtime_ns == stamp
    config: dict[str, Any] = json.loads((made / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    with safe_open(made / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
        assert file.get_slice("model.embed_tokens.weight").get_shape() == [49152, 576]
