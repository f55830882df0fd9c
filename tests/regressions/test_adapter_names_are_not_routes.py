"""``shoal adapters rm ../models`` once sent ``DELETE /v1/models``."""

import argparse

import pytest

from shoal.server.cli import adapters


@pytest.mark.parametrize(
    "words", [["rm", "../models"], ["show", "a@1"], ["activate", "a/b/c", "1"]]
)
def test_what_is_no_name_is_refused_before_anything_is_sent(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    adapters.add_arguments(parser)
    verb, *rest = words
    assert adapters.run(parser.parse_args([verb, "--url", "http://127.0.0.1:9", *rest])) == 1
    assert "is no adapter name" in capsys.readouterr().err
