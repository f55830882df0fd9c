"""``shoal train --fleet``: options in, exit status out."""

import argparse
import json
from pathlib import Path
from typing import Any, Protocol

import pytest

from shoal.server.cli.train import add_arguments, run


class FleetLab(Protocol):
    """The fixture of this folder's conftest.py."""

    base: Path
    root: Path

    def tasks(self, *tenants: dict[str, Any], name: str = ...) -> Path: ...


def parse(lab: FleetLab, *options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    paths = ["--base", str(lab.base), "--out", str(lab.root / "out"), "--device", "cpu"]
    return parser.parse_args(["--method", "lora-xs", *paths, *options])


def test_a_fleet_is_trained_published_and_counted(
    fleet_lab: FleetLab, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = fleet_lab.tasks({"name": "a"}, {"name": "b", "owner": "acme", "tags": {"k": "v"}})
    registry = f"sqlite:///{fleet_lab.root / 'registry.db'}"
    options = ("--fleet", str(tasks), "--steps", "2", "--rank", "4", "--batch-size", "2")
    assert run(parse(fleet_lab, *options, "--rows", "8", "--registry", registry)) == 0
    out = capsys.readouterr().out
    assert "2 lora-xs adapters of 224 values in 2 steps, 2 published" in out
    lines = (fleet_lab.root / "out/_fleet/results.jsonl").read_text().splitlines()
    assert [json.loads(line)["published"] for line in lines] == ["a@1", "acme/b@1"]


def test_what_is_not_published_is_said_and_tried_again_when_resumed(
    fleet_lab: FleetLab, capsys: pytest.CaptureFixture[str]
) -> None:
    # An adapter must not be called as the base is; its directory is written all the same.
    name = fleet_lab.base.name.lower()
    tasks = fleet_lab.tasks({"name": name}, {"name": "other"})
    registry = f"sqlite:///{fleet_lab.root / 'registry.db'}"
    options = ("--fleet", str(tasks), "--steps", "2", "--rank", "4", "--registry", registry)
    for extra in ((), ("--resume",)):
        assert run(parse(fleet_lab, *options, *extra)) == 1
        captured = capsys.readouterr()
        assert f"{name} is not published: " in captured.err
        assert "2 lora-xs adapters of 224 values in 2 steps, 1 published" in captured.out
    assert (fleet_lab.root / "out" / name / "adapter_model.safetensors").is_file()
    lines = (fleet_lab.root / "out/_fleet/results.jsonl").read_text().splitlines()
    assert len(lines) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "data is None: must be given, or fleet"),
        (("--data", "d", "--rows", "8"), "rows is 8: needs fleet"),
        (("--data", "d", "--registry", "sqlite://"), "registry is sqlite://: needs fleet"),
        (("--fleet", "t", "--data", "d"), "data is d: excludes fleet"),
        (("--fleet", "t", "--store", "s"), "store is s: needs a registry"),
        (("--fleet", "absent"), "absent: cannot be read"),
        (("--fleet", "t", "--rows", "0"), "rows is 0: must be at least batch-size, 4"),
    ],
)
def test_what_makes_no_sense_is_refused_with_status_2(
    fleet_lab: FleetLab,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    message: str,
) -> None:
    assert run(parse(fleet_lab, *options)) == 2
    assert message in capsys.readouterr().err
    assert not (fleet_lab.root / "out").exists()
