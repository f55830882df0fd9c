"""``shoal train`` takes every method with its own options."""

import argparse
from dataclasses import fields
from pathlib import Path

import pytest
from tests.adapters.training.method_cases import CASES, options_of

from shoal.adapters.training.config import TrainConfig
from shoal.server.cli.train import add_arguments


def parsed(*argv: str) -> TrainConfig:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(["--base", "b", "--data", "d", "--out", "o", *argv])
    return TrainConfig(**{spec.name: getattr(args, spec.name) for spec in fields(TrainConfig)})


@pytest.mark.parametrize("name", CASES)
def test_the_command_line_says_what_a_config_says(name: str) -> None:
    argv = []
    for option, value in options_of(name).items():
        argv += [f"--{option.replace('_', '-')}"] + ([] if value is True else [str(value)])
    paths = {"base": Path("b"), "data": Path("d"), "out": Path("o")}
    assert parsed(*argv) == TrainConfig(**paths, **options_of(name))


def test_help_says_whose_an_option_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "--lr-ratio LR_RATIO lora-plus only: " in text
    assert "--svd {exact,randomised} lora-xs, pissa only: " in text
