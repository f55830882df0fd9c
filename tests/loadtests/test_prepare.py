"""``shoal bench prepare`` and the server, uploads and load that its files are for."""

import argparse
import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path

import httpx
import pytest

from shoal.loadtests import prepare, run
from shoal.loadtests.client import list_models
from shoal.loadtests.uploads import adapter_folders, upload_all
from shoal.server.assemble import assemble
from shoal.server.config import ServeConfig
from shoal.server.http.app import create_app

Bench = Callable[..., int]


def prepared(folder: Path, *words: str) -> int:
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    own = ["--model-shape", "tiny", "--adapters", "3", "--rank", "8", "--device", "cpu"]
    return prepare.run(parser.parse_args([str(folder), *own, *words]))


Connect = Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]


@contextmanager
def server(folder: Path, **change: object) -> Iterator[Connect]:
    """A new server of what was prepared there; yields what connects to it, as ``connect`` does."""
    fields = {
        "model": str(folder / "model"),
        "load_format": "dummy",
        "device": "cpu",
        "registry": f"sqlite:///{folder / 'registry.db'}",
        "max_model_len": 128,
        "kv_cache_memory": 4 << 20,
        "adapter_memory": 4 << 20,
    }
    with assemble(ServeConfig(**(fields | change))) as services:  # type: ignore[arg-type]
        app = create_app(services)

        @asynccontextmanager
        async def connect(*_: object) -> AsyncIterator[httpx.AsyncClient]:
            transport = httpx.ASGITransport(app=app)
            client = httpx.AsyncClient(transport=transport, base_url="http://test")
            async with app.router.lifespan_context(app), client:
                yield client

        yield connect


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    """``shoal bench serve`` with these words, on a new server."""

    def start(folder: Path, *words: str, **change: object) -> int:
        with server(folder, **change) as connect:
            monkeypatch.setattr(run, "connect", connect)
            parser = argparse.ArgumentParser()
            run.add_arguments(parser)
            load = ["--num-prompts", "4", "--input-len", "12", "--output-len", "6"]
            return run.run(parser.parse_args([*load, *words]))

    return start


def test_a_server_takes_the_adapters_and_serves_them(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepared(tmp_path) == 0
    own = ["--upload", str(tmp_path / "adapters"), "--adapters", "load-*", "--popularity", "each"]
    capsys.readouterr()
    assert bench(tmp_path, *own) == 0
    said, *table, last = capsys.readouterr().out.splitlines()
    assert said.startswith("uploads: first ")
    assert "; 2 more, 8 at a time: median " in said
    assert [line.split()[0] for line in table[1:]] == ["load-0000", "load-0001", "load-0002", "all"]
    figures = json.loads(last)
    assert (figures["completed"], figures["output_tokens"]) == (4, 24)
    assert (figures["adapters_registered"], figures["adapters_used"]) == (3, 3)
    uploads = figures["uploads"]
    files = (tmp_path / "adapters").rglob("*.*")
    assert uploads["bytes"] == sum(path.stat().st_size for path in files)
    assert uploads["count"] == 3
    assert 0 < uploads["p50_ms"] <= uploads["max_ms"]
    assert uploads["per_s"] > 0


def test_a_server_with_another_basis_refuses_and_the_folder_is_named(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepared(tmp_path) == 0
    assert bench(tmp_path, "--upload", str(tmp_path / "adapters"), basis_rank=16) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"upload of {tmp_path / 'adapters' / 'load-0000'}: HTTP 422: " in error
    assert "basis" in error


@pytest.mark.parametrize("family", ["core", "fold", "lora"])
def test_every_adapter_changes_the_answer_in_its_own_way(family: str, tmp_path: Path) -> None:
    assert prepared(tmp_path, "--family", family) == 0

    async def answers(connect: Connect) -> set[str]:
        async with connect() as client:
            await upload_all(client, adapter_folders(tmp_path / "adapters"))
            body = {"prompt": "Once", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
            found = set()
            for name in await list_models(client):
                answer = await client.post("/v1/completions", json=body | {"model": name})
                found.add(answer.json()["choices"][0]["text"])
            return found

    with server(tmp_path) as connect:
        assert len(asyncio.run(answers(connect))) == 4  # of the base, too


def test_what_to_run_next_parses_and_says_what_the_server_must_be_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepared(tmp_path, "--basis-rank", "8", "--dtype", "bfloat16") == 0
    server, base, adapters = capsys.readouterr().out.splitlines()
    assert server.endswith("--device cpu --dtype bfloat16 --basis-rank 8")
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    for command in (base, adapters):
        args = parser.parse_args(command.replace("'", "").split()[3:])
        assert args.num_prompts == 3
    assert args.adapters == "load-*"


def test_what_cannot_be_prepared_is_refused_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepared(tmp_path / "new", "--basis-rank", "7") == 2
    assert "the rank is 8: must be from 1 to 7" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    (tmp_path / "adapters").mkdir()
    assert prepared(tmp_path) == 2
    assert f"{tmp_path / 'adapters'} is there already" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
