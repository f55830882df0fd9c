"""``shoal bench serve`` ran the whole load and then lost it to a folder it could not write."""

import argparse
from pathlib import Path

import pytest

from shoal.loadtests.run import add_arguments, run
from shoal.loadtests.workload import Lengths


def parse(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    # Nobody listens there: whoever gets as far as sending fails in another way.
    return parser.parse_args(["--base-url", "http://127.0.0.1:1", *flags])


def test_a_folder_that_cannot_be_made_is_named_before_anything_is_sent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert run(parse("--save-dir", str(tmp_path / "file" / "out"))) == 2
    assert "--save-dir cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["5:2", "0", "x", "1:2:3", ""])
def test_lengths_that_are_none_are_refused_with_the_rule(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse("--input-len", text)
    assert "must be N or A:B with 1 <= A <= B" in capsys.readouterr().err


def test_lengths_default_to_numbers_that_help_can_show() -> None:
    assert parse().output_len == Lengths(minimum=64, maximum=64)
    assert parse("--input-len", "3:9").input_len == Lengths(minimum=3, maximum=9)
