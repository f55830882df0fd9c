"""``shoal bench serve`` as a whole, against a real server on a free port."""

import argparse
import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.loadtests import run

EVENT = 'data: {"choices": [{"text": "x", "token_ids": [7]}]}\n\n'
USAGE = 'data: {"choices": [], "usage": {"prompt_tokens": 4}}\n\ndata: [DONE]\n\n'
ANSWERS = {
    "/v1/models": '{"data": [{"id": "base"}, {"id": "a"}, {"id": "b"}], "has_more": false}',
    "/tokenize": '{"tokens": [5, 6, 7, 8]}',
    "/v1/completions": EVENT * 3 + USAGE,
}


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    length = next(
        (int(h[16:]) for h in head.lower().split("\r\n") if h[:15] == "content-length:"), 0
    )
    await reader.readexactly(length)
    body = ANSWERS[head.split()[1].partition("?")[0]]
    top = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    writer.write((top + body).encode())
    await writer.drain()
    writer.close()


@pytest.fixture
def url() -> Iterator[str]:
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(_answer, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    server.close()
    loop.run_until_complete(server.wait_closed())
    loop.close()


def bench(*words: str) -> int:
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    return run.run(parser.parse_args(words))


def test_a_run_prints_a_table_and_ends_in_one_json_line(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--adapters", "*", "--popularity", "each", "--num-prompts", "6"]
    assert bench("--base-url", url, *words, "--save-dir", str(tmp_path)) == 0
    *table, last = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table] == ["adapter", "a", "b", "all"]
    figures = json.loads(last)
    assert figures["completed"] == 6
    assert figures["output_tokens"] == 18
    assert figures["output_len"] == {"minimum": 64, "maximum": 64}
    assert figures["adapters_used"] == 2
    summary = json.loads((tmp_path / "serve.json").read_text())
    assert summary["adapters"]["a"]["completed"] == 3
    assert len((tmp_path / "serve.jsonl").read_text().splitlines()) == 6
    assert (tmp_path / "serve.png").read_bytes().startswith(b"\x89PNG")


def test_several_client_processes_send_every_request_once(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--adapters", "*", "--popularity", "each", "--num-prompts", "7"]
    assert bench("--base-url", url, *words, "--client-processes", "3", "--request-rate", "50") == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (figures["completed"], figures["output_tokens"]) == (7, 21)
    assert figures["client_processes"] == 3
    assert bench("--base-url", url, "--client-processes", "2", "--max-concurrency", "4") == 2


def test_a_range_of_adapters_is_not_listed_first(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("--base-url", url, "--adapter-range", "u000:u999", "--num-prompts", "20") == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["completed"] == 20
    assert figures["adapters_used"] > 15
    assert figures["adapters_registered"] == 1000


def test_a_server_that_is_not_there_is_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--base-url", "http://127.0.0.1:9") == 2
    assert capsys.readouterr().err.startswith("error: http://127.0.0.1:9: ")


@pytest.mark.parametrize(
    "words", [("--adapters", "nobody"), ("--goodput", "speed:3"), ("--num-prompts", "0")]
)
def test_impossible_wishes_are_refused(
    url: str, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("--base-url", url, *words) == 2
    assert "error: " in capsys.readouterr().err
