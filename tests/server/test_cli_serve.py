"""``shoal serve``: what cannot be started is one line that names a flag, and an exit code."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from shoal.server.cli import serve


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return serve.run(parser.parse_args(arguments))


@contextmanager
def raising(error: Exception) -> Iterator[Any]:
    raise error
    yield


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("--max-model-len is 7: must be less"), "error: --max-model-len is 7"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nmore"),
            "error: the GPU ran out of memory: CUDA out of memory. Tried to allocate 9 GiB\nhint: ",
        ),
    ],
)
def test_what_cannot_start_says_why(
    error: Exception,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("shoal.server.assemble.assemble", lambda _: raising(error))
    assert run("model") == 1
    assert words in capsys.readouterr().err


def test_a_flag_that_breaks_its_rule_costs_no_start(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--attention", "xformers") == 2
    assert "--block-size is 16: must be a multiple of 64" in capsys.readouterr().err
