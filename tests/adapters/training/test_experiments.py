"""The experiments' plan, log, budget and report, without training anything."""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shoal.adapters.training.config import METHOD_NAMES, TrainConfig
from shoal.adapters.training.errors import DataRejected
from shoal.adapters.training.experiments import driver
from shoal.adapters.training.experiments.__main__ import main
from shoal.adapters.training.experiments.choosing import at_edge, best_rate, sweep_left
from shoal.adapters.training.experiments.claims import CLAIMS, answer
from shoal.adapters.training.experiments.costs import SETTINGS
from shoal.adapters.training.experiments.driver import Clock, work
from shoal.adapters.training.experiments.log import Log
from shoal.adapters.training.experiments.plan import groups_of, plan
from shoal.adapters.training.experiments.report import results, write_report
from shoal.adapters.training.experiments.running import Lab
from shoal.adapters.training.experiments.settings import GRIDS, Group, Setting, sweep_of
from shoal.adapters.training.experiments.statistics import spread, verdict
from shoal.adapters.training.experiments.tables import TABLES, Table
from shoal.adapters.training.experiments.tasks import (
    SPLITS,
    TASKS,
    missing,
    passages,
    splits_of,
    write_all,
)

SEEDS = (1, 2, 3)
LORA = Setting("LoRA", "lora", {"rank": 2})
TINY = Table("tiny", "Tiny", ((LORA, ("words", "lists")),))


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    log = Log(tmp_path / "experiments.jsonl")
    return Lab(tmp_path, tmp_path, tmp_path, tmp_path, "cpu", 300, SEEDS, log)


def log_group(lab: Lab, table: str, group: Group, **values: Any) -> None:
    """As ``run_group`` would; the best rate is the second of the grid."""
    best = group.setting.grid[min(1, len(group.setting.grid) - 1)]
    for run, (seed, lr) in zip(group.runs, group.lanes, strict=True):
        measured = {
            "final_loss": abs(math.log(lr / best)),
            "early_loss": 1.0,
            "first_grad_norm": 1.0,
            "parameters": 10,
            "losses": [2.0, 1.0],
            "directory": run,
            **values,
        }
        place = {"commit": "abc", "gpu": "none", "torch": "2"}
        own = {"task": group.task, "seed": seed, "lr": lr, "lanes": len(group.lanes)}
        lab.log.append("run", id=run, table=table, seconds=1.0, **own, **measured, **place)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Group]:
    """Groups that were run; nothing is trained."""
    done: list[Group] = []

    def run(lab: Lab, table: str, group: Group) -> None:
        done.append(group)
        log_group(lab, table, group)
        for name in group.runs:
            (lab.out / name).mkdir(exist_ok=True)

    monkeypatch.setattr(driver, "run_group", run)
    return done


def every_setting() -> list[Setting]:
    return [*SETTINGS, *(setting for table in TABLES.values() for setting, _ in table.rows)]


def test_every_setting_is_one_that_the_trainer_takes() -> None:
    for setting in every_setting():
        TrainConfig(
            method=setting.method,  # type: ignore[arg-type]
            base=Path("b"),
            data=Path("d"),
            out=Path("o"),
            **setting.asked,
        )
        assert len(setting.grid) in (1, 4, 6)
        assert list(setting.grid) == sorted(setting.grid)
    assert set(GRIDS) == set(METHOD_NAMES)


def test_a_setting_is_trained_once_whatever_tables_it_stands_in() -> None:
    labels: dict[str, set[str]] = {}
    for setting in every_setting():
        labels.setdefault(setting.id, set()).add(setting.label)
    assert all(len(names) == 1 for names in labels.values())
    runs = Counter(run for table in TABLES.values() for g in groups_of(table) for run in g.runs)
    assert max(runs.values()) > 1
    assert replace(LORA, label="other").id == LORA.id
    assert Setting("LoRA", "lora", {"rank": 3}).id != LORA.id


def test_runs_of_a_group_have_ids_and_directories_of_their_own() -> None:
    for table in TABLES.values():
        groups = groups_of(table)
        assert len({group.id for group in groups}) == len(groups)
        for group in groups:
            assert len(set(group.runs)) == len(group.lanes)


def test_the_plan_counts_what_is_shared_once() -> None:
    rows = [line.split("|")[1:-1] for line in plan(TABLES.values()).splitlines()[2:]]
    unshared = sum(len(groups_of(table)) for table in TABLES.values())
    assert [row[0].strip() for row in rows] == [*(f"`{name}`" for name in TABLES), "all"]
    assert sum(int(row[1]) for row in rows[:-1]) == int(rows[-1][1]) < unshared


def test_a_table_is_swept_then_trained_and_not_again(lab: Lab, trained: list[Group]) -> None:
    assert work(lab, [TINY], Clock(math.inf), None)
    sweep, *main = trained
    assert sweep == sweep_of(LORA)
    assert [(group.task, group.lanes) for group in main] == [
        (task, tuple((seed, LORA.grid[1]) for seed in SEEDS)) for task in ("words", "lists")
    ]
    assert best_rate(lab.log, LORA, 300) == LORA.grid[1]
    assert len(lab.unscored()) == 6  # those of the sweep need none

    trained.clear()
    again = replace(lab, log=Log(lab.log.path))
    assert work(again, [TINY], Clock(math.inf), None)
    assert not trained
    more = replace(again, seeds=(1, 2, 3, 4))
    assert work(more, [TINY], Clock(math.inf), None)
    assert [group.lanes for group in trained] == [((4, LORA.grid[1]),)] * 2


def test_an_adapter_lost_before_it_was_scored_is_trained_again(
    lab: Lab, trained: list[Group]
) -> None:
    assert work(lab, [TINY], Clock(math.inf), None)
    scored, lost = trained[1].runs[:2]
    lab.log.append("score", id=scored)
    for run in (scored, lost):
        (lab.out / run).rmdir()
    trained.clear()
    assert work(lab, [TINY], Clock(math.inf), None)
    assert [group.runs for group in trained] == [(lost,)]


def test_nothing_is_begun_that_the_time_left_does_not_hold(
    lab: Lab, trained: list[Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(driver.time, "monotonic", lambda: now[0])
    log_run = driver.run_group

    def slow(lab: Lab, table: str, group: Group) -> None:
        log_run(lab, table, group)
        now[0] += 100.0

    monkeypatch.setattr(driver, "run_group", slow)
    first = Clock(250.0)
    assert first.training_s(sweep_of(LORA)) < 100
    assert not work(lab, [TINY], first, None)
    # What took 100 s is foreseen to again: a third one would end at 300.
    assert len(trained) == 2
    assert now[0] <= 250.0


def test_a_sweep_whose_runs_diverged_chooses_among_the_others(lab: Lab) -> None:
    sweep = sweep_of(LORA)
    log_group(lab, "tiny", Group(LORA, sweep.task, sweep.lanes[1:2]), final_loss=3.0)
    assert best_rate(lab.log, LORA, 300) is None
    others = sweep_left(lab.log, LORA, 300)
    assert others is not None
    assert others.lanes == (sweep.lanes[0], *sweep.lanes[2:])
    log_group(lab, "tiny", others, final_loss=None)
    assert best_rate(lab.log, LORA, 300) == LORA.grid[1]
    assert not at_edge(lab.log, LORA, 300)
    assert sweep_left(lab.log, LORA, 300) is None


@pytest.mark.parametrize(
    ("best", "tried"), [(-2, []), (-1, [0.02]), (0, [3e-4]), (9, [0.02, 0.04])]
)
def test_a_sweep_goes_on_beyond_an_end_that_is_best(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, best: int, tried: list[float]
) -> None:
    monkeypatch.setitem(GRIDS, "lora", (5e-4, 1e-3, 5e-3, 1e-2))  # type: ignore[arg-type]
    # 9: the higher the better, wherever it ends.
    wanted = 1.0 if best == 9 else LORA.grid[best]

    def sweep() -> list[float]:
        rates = []
        while (group := sweep_left(lab.log, LORA, 300)) is not None:
            for run, (_, rate) in zip(group.runs, group.lanes, strict=True):
                loss = abs(math.log(rate / wanted))
                lab.log.append("run", id=run, final_loss=loss)
                rates.append(rate)
        return rates

    assert sweep() == [*LORA.grid, *tried]
    assert best_rate(lab.log, LORA, 300) == (0.04 if best == 9 else wanted)
    assert at_edge(lab.log, LORA, 300) == (best == 9)
    # A wider grid trains what it has more, and nothing again.
    monkeypatch.setitem(GRIDS, "lora", (1e-4, 1e-3, 5e-3, 1e-2))  # type: ignore[arg-type]
    assert sweep()[:1] == [1e-4]
    assert not at_edge(lab.log, replace(LORA, lr=0.5), 300)


def test_a_line_cut_short_is_dropped_and_written_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "experiments.jsonl"
    log = Log(path)
    log.append("run", id="a", loss=1.5)
    log.append("score", id="a", accuracy=0.5)
    with path.open("a") as file:
        file.write('{"kind": "run", "id": "b", "lo')
    again = Log(path)
    assert [line["id"] for line in again.lines("run")] == ["a"]
    again.append("run", id="b", loss=2.0)
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["a", "a", "b"]


def test_verdicts_need_an_interval_without_zero() -> None:
    assert verdict([]) == "not measured"
    assert verdict([1.0]) == "no difference to be seen"
    assert verdict([0.0, 0.0, 0.0]) == "no difference to be seen"
    assert verdict([1.0, 1.1, 0.9]) == "holds"
    assert verdict([-1.0, -1.1, -0.9]) == "does not hold"
    # Two standard errors from zero, which three seeds are too few for.
    assert verdict([1.0, 2.0, 0.0]) == "no difference to be seen"
    found = spread([1.0, 2.0, 3.0])
    assert (found.mean, found.sd, found.count) == (2.0, 1.0, 3)


def score_claim(lab: Lab, ahead: float, *, seeds: tuple[int, ...] = SEEDS) -> None:
    """Both settings of the first claim, the first better by so much."""
    claim = CLAIMS[0]
    for setting, accuracy in ((claim.a, 0.5 + ahead), (claim.b, 0.5)):
        log_group(lab, "miss", sweep_of(setting))
        for task in claim.tasks:
            lanes = tuple((seed, setting.grid[1]) for seed in seeds)
            group = Group(setting, task, lanes)
            log_group(lab, "miss", group)
            for run, seed in zip(group.runs, seeds, strict=True):
                lab.log.append("score", id=run, accuracy=accuracy + 0.001 * seed, forgetting_loss=1)


def test_a_claim_is_answered_over_the_tasks_that_both_sides_have(lab: Lab) -> None:
    claim = CLAIMS[0]
    assert answer(lab.log, claim, SEEDS, 300).verdict == "not measured"
    score_claim(lab, 0.1)
    found = answer(lab.log, claim, SEEDS, 300)
    assert found.verdict == "holds"
    assert found.tasks == claim.tasks
    assert found.difference is not None
    assert found.difference.mean == pytest.approx(0.1)
    turned = replace(claim, a=claim.b, b=claim.a)
    assert answer(lab.log, turned, SEEDS, 300).verdict == "does not hold"
    assert answer(lab.log, claim, (1, 2, 3, 4), 300).verdict == "not measured"


def test_the_report_says_what_is_missing_and_what_was_found(lab: Lab, tmp_path: Path) -> None:
    empty = results(lab.log, SEEDS, 300)
    assert empty.count("**not measured**") == len(CLAIMS)
    score_claim(lab, -0.2, seeds=(1, 2))
    files = write_report(lab.log, tmp_path / "to", seeds=(1, 2), steps=300)
    text = files[0].read_text()
    assert f"| {CLAIMS[0].text} | MiSS, Table 5 | **does not hold** | -20.0 ± 0.0 |" in text
    assert "![miss](results/miss.png)" in text
    assert {"RESULTS.md", "miss.png"} <= {path.name for path in files}
    assert text.count("**not measured**") < len(CLAIMS)


def test_the_costs_are_reported_as_shares_and_ratios(lab: Lab) -> None:
    for label, init, step in (("LoRA-XS r=16", 3.0, 10.0), ("LoRA r=16", 0.1, 20.0)):
        seconds = {"init_seconds": init, "cached_init_seconds": 0.1}
        steps = {"step_ms": step, "step_ms_p90": step, "peak_memory": 1 << 20, "parameters": 5}
        where = {"gpu": "H100", "torch": "2"}
        lab.log.append("cost", id=f"cost-{label}", label=label, **seconds, **steps, **where)
    text = results(lab.log, SEEDS, 300)
    assert "| LoRA-XS r=16 | 5 | 3.00 | 0.10 | 50.0 % | 10.00 | 10.00 | 1 |" in text
    assert "50.0 % of 300 updates, **does not hold**; under 1 % from 29,700 updates on" in text
    assert "LoRA's (LoRA-XS, Table 6): step ms × 0.50, **holds** (one run)" in text
    assert "MiSS is faster than DoRA: not measured" in text
    assert "Measured on: H100, torch 2." in text


def test_the_command_line_says_what_it_lacks_and_plans_without_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path)]
    assert main(["miss", *out]) == 2
    assert "miss needs --base" in capsys.readouterr().err
    assert main(["miss", "--base", str(tmp_path), *out]) == 2
    assert "words.train.jsonl; make it with `data`" in capsys.readouterr().err
    assert main(["plan", *out]) == 0
    assert "| `lora-xs-init` | 20 |" in capsys.readouterr().out
    assert main(["report", *out, "--to", str(tmp_path / "to")]) == 0
    assert (tmp_path / "to" / "RESULTS.md").is_file()


def test_splits_share_no_question_and_are_always_the_same() -> None:
    pytest.importorskip("reasoning_gym")
    sizes = {"train": 40, "valid": 10, "test": 10}
    for source in TASKS.values():
        splits = splits_of(source, 3, sizes)
        questions = [r.messages[0][1] for records in splits.values() for r in records]
        assert len(set(questions)) == 60
        assert {name: len(records) for name, records in splits.items()} == sizes
        assert splits == splits_of(source, 3, sizes) != splits_of(source, 4, sizes)


def test_a_task_of_several_generators_has_as_much_of_each() -> None:
    pytest.importorskip("reasoning_gym")
    legs, words = TASKS["words"], TASKS["strings"]
    both = replace(legs, others=((words.generator, words.options),))
    assert both.generators == ("leg_counting", "spell_backward")
    splits = splits_of(both, 3, {"train": 30, "test": 10})
    questions = [r.messages[0][1] for records in splits.values() for r in records]
    assert len(set(questions)) == 40
    assert sum("backward" in question for question in questions) == 20
    # One that makes the same items is asked for others.
    twice = splits_of(replace(legs, others=((legs.generator, legs.options),)), 3, {"train": 40})
    assert len({record.messages[0][1] for record in twice["train"]}) == 40
    with pytest.raises(DataRejected, match="are needed"):
        splits_of(
            replace(legs, options={"min_animals": 1, "max_animals": 1, "max_instances": 1}), 3
        )


def test_the_data_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("reasoning_gym")
    for split, size in {"train": 6, "valid": 2, "test": 2}.items():
        monkeypatch.setitem(SPLITS, split, size)  # type: ignore[arg-type]
    assert len(missing(tmp_path)) == 13
    write_all(tmp_path)
    assert not missing(tmp_path)
    pieces = passages()
    assert len(pieces) == 32
    assert "Gutenberg" not in " ".join(pieces)
    assert passages("a b c") == ["a b c"]
