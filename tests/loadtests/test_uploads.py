"""Uploads before a run, against a server that is a function."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import pytest

from shoal.loadtests.client import ServerError
from shoal.loadtests.uploads import AT_ONCE, FILES, UploadFigures, adapter_folders, upload_all

Respond = Callable[[httpx.Request], Awaitable[httpx.Response]]


def folders(directory: Path, count: int) -> list[Path]:
    for i in range(count):
        own = directory / f"a{i:02d}"
        own.mkdir()
        for name in FILES:
            (own / name).write_text(f"{name} of {i}")
        (own / "README.md").write_text("not for the server")
    return adapter_folders(directory)


def upload(respond: Respond, found: list[Path]) -> UploadFigures:
    async def go() -> UploadFigures:
        transport = httpx.MockTransport(respond)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await upload_all(client, found)

    return asyncio.run(go())


def sent_name(body: str) -> str:
    return body.split('name="name"')[1].split()[0]


def test_the_first_goes_alone_and_the_others_a_few_at_a_time(tmp_path: Path) -> None:
    under_way: list[int] = [0]
    seen: list[str] = []

    async def respond(request: httpx.Request) -> httpx.Response:
        body = (await request.aread()).decode()
        seen.append(sent_name(body))
        assert all(f'filename="{name}"' in body for name in FILES)
        assert "README" not in body
        under_way.append(under_way[-1] + 1)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        under_way.append(under_way[-1] - 1)
        return httpx.Response(201)

    figures = upload(respond, folders(tmp_path, 30))
    assert seen == [f"a{i:02d}" for i in range(30)]
    assert under_way[:3] == [0, 1, 0]
    assert max(under_way) == AT_ONCE
    assert figures.count == 30
    assert figures.bytes == sum(len(f"{name} of {i}") for name in FILES for i in range(30))


def test_one_upload_has_no_others_to_speak_of(tmp_path: Path) -> None:
    async def respond(request: httpx.Request) -> httpx.Response:
        return httpx.Response(201)

    figures = upload(respond, folders(tmp_path, 1))
    assert (figures.p50_ms, figures.max_ms, figures.per_s) == (None, None, None)
    assert str(figures) == f"uploads: first {figures.first_ms:.0f} ms"


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (httpx.Response(400, json={"error": {"message": "r is 0"}}), "HTTP 400: r is 0"),
        (httpx.Response(502, text="<html>"), "HTTP 502: <html>"),
        (httpx.ReadTimeout("too slow"), "ReadTimeout: too slow"),
    ],
)
def test_a_refusal_names_the_folder_and_stops_the_others(
    answer: httpx.Response | Exception, says: str, tmp_path: Path
) -> None:
    sent = 0

    async def respond(request: httpx.Request) -> httpx.Response:
        nonlocal sent
        sent += 1
        if sent_name((await request.aread()).decode()) != "a03":  # its boundary is random
            await asyncio.sleep(0)
            return httpx.Response(201)
        if isinstance(answer, Exception):
            raise answer
        return answer

    found = folders(tmp_path, 30)
    with pytest.raises(ServerError) as problem:
        upload(respond, found)
    assert str(problem.value) == f"upload of {found[3]}: {says}"
    assert sent < 30


def test_folders_that_are_no_adapters_are_refused_before_anything_is_sent(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--upload cannot be read: .*nowhere"):
        adapter_folders(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no folders of adapters"):
        adapter_folders(tmp_path)
    folders(tmp_path, 2)[1].joinpath(FILES[1]).unlink()
    with pytest.raises(ValueError, match=f"a01 has no {FILES[1]}"):
        adapter_folders(tmp_path)
