"""The matrix: every case and count, the budget, and that nothing measured is lost."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shoal.loadtests import matrix
from shoal.loadtests.driver import Bench, Case, Outcome, RunFailed

SMALL = ["--model-shape", "tiny", "--device", "cpu", "--rank", "4", "--resident", "40"]
ABSENT = ("fastapi", "uvicorn", "pydantic", "sqlalchemy", "platformdirs", "tqdm", "fsspec", "httpx")


def measure(capsys: pytest.CaptureFixture[str], *flags: str, status: int = 0) -> dict[str, Any]:
    assert matrix.main([*SMALL, *flags]) == status
    last = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert isinstance(last, dict)
    return last


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_case_is_measured_with_every_count(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    results = tmp_path / "matrix.jsonl"
    flags = ["--cases", "6x20x8,3x9x6", "--adapters", "1,4", "--rounds", "2"]
    last = measure(capsys, *flags, "--results", str(results))
    # There are no more different adapters than requests.
    found = [(row["case"], row["adapters"]) for row in last["cases"]]
    assert found == [(c, n) for c, most in (("6x20x8", 4), ("3x9x6", 3)) for n in (0, 1, most)]
    for row in last["cases"]:
        assert len(row["ratios"]) == 2
        assert row["unsteady_requests"] == 0
        assert bool(row["changed_requests"]) == bool(row["adapters"])
    runs = lines(results)
    assert len(runs) == 2 * 2 * 3
    assert [run["adapters"] for run in runs[:6]] == [0, 1, 4, 0, 1, 4]
    assert runs[0].keys() >= {"requests", "input", "output", "step_ms", "commit", "gpu", "triton"}
    assert {run["run_id"] for run in runs} == {last["run_id"]}


def test_no_case_begins_when_the_budget_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    last = measure(capsys, "--cases", "2x5x3", "--adapters", "1", "--budget-s", "0")
    assert last["cases"] == []


def test_only_the_base(capsys: pytest.CaptureFixture[str]) -> None:
    last = measure(capsys, "--cases", "2x5x3", "--adapters", "0", "--rounds", "1")
    assert [row["adapters"] for row in last["cases"]] == [0]


def test_a_case_that_fails_leaves_those_before_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Bench.outcome

    def outcome(self: Bench, case: Case, *args: Any, **kwargs: Any) -> Outcome:
        if case.requests == 3:
            raise RunFailed("no luck")
        return whole(self, case, *args, **kwargs)

    monkeypatch.setattr(Bench, "outcome", outcome)
    flags = ["--cases", "2x5x3,3x5x3,4x5x3", "--adapters", "1", "--rounds", "1"]
    last = measure(capsys, *flags, status=1)
    assert {row["case"] for row in last["cases"]} == {"2x5x3"}


@pytest.mark.parametrize("family", ["core", "fold", "lora"])
def test_uploads_change_no_token_and_the_bank_is_left_as_it_was(
    family: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    results = tmp_path / "matrix.jsonl"
    flags = ["--cases", "6x20x30", "--adapters", "6", "--rounds", "1", "--family", family]
    flags += ["--uploads", "60000", "--profile", "--results", str(results)]
    uploads = measure(capsys, *flags)["uploads"]
    assert uploads["count"] > matrix.UPLOAD_PLACES
    assert uploads["same_tokens"]
    for side in ("with", "without"):
        assert uploads[side]["p99_ms"] >= uploads[side]["p50_ms"] > 0.0
    kinds = [line["kind"] for line in lines(results)]
    assert kinds == ["run", "run", "uploads", "profile", "profile"]


@pytest.mark.parametrize("cases", ["6x20", "6x20x0", "x"])
def test_what_is_no_case_is_refused(cases: str) -> None:
    with pytest.raises(SystemExit):
        matrix.main([*SMALL, "--cases", cases])


def test_it_runs_where_only_torch_is_installed() -> None:
    blocked = f"import sys; sys.modules.update(dict.fromkeys({ABSENT!r}))"
    flags = [*SMALL, "--cases", "2x5x3", "--adapters", "1", "--rounds", "1"]
    script = f"{blocked}; from shoal.loadtests.matrix import main; sys.exit(main({flags!r}))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
