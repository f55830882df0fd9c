"""Uploads beside streams: what is sent, when, and how a silence is counted."""

import asyncio
import json
import pickle
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load, save

from shoal.loadtests.pauses import Gaps
from shoal.loadtests.steady_uploads import UploadPlan, UploadsDone, upload_steadily
from shoal.loadtests.streams import Stream
from shoal.loadtests.variants import WEIGHTS, variant

LATENT, PROBE = "a.lora_latent_mapping.weight", "a.basis_probe"


def files(dtype: torch.dtype = torch.float32) -> dict[str, bytes]:
    tensors = {PROBE: torch.ones(4, 4), LATENT: torch.full((2, 2), 0.5, dtype=dtype)}
    return {"adapter_config.json": b"{}", WEIGHTS: save(tensors)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_variants_differ_in_their_own_numbers_alone(dtype: torch.dtype) -> None:
    seen = set()
    for number in (0, 1, 255, 256, 1 << 31):
        made = variant(files(dtype), number)
        tensors = load(made[WEIGHTS])
        seen.add(made[WEIGHTS])
        assert torch.equal(tensors[PROBE], torch.ones(4, 4))
        assert torch.isfinite(tensors[LATENT]).all()
        assert (tensors[LATENT].float() - 0.5).abs().max() < 2.0
        assert made["adapter_config.json"] == b"{}"
    assert len(seen) == 5


@pytest.mark.parametrize(
    "data", [b"", b"12345678", b"\x02\0\0\0\0\0\0\0{}", b"\x02\0\0\0\0\0\0\0[]"]
)
def test_what_is_no_adapter_has_no_variants(data: bytes) -> None:
    with pytest.raises(ValueError, match=WEIGHTS):
        variant({WEIGHTS: data}, 1)


def test_gaps_are_within_an_answer_and_reach_into_the_time() -> None:
    stream = Stream("m", (1,), 8)
    stream.answers = [[0.0, 1.0, 2.0, 5.0], [9.0, 10.0, 10.5]]
    assert list(stream.gaps(1.5, 10.2)) == [1.0, 3.0, 1.0, 0.5]
    assert list(stream.gaps(10.0, 14.5)) == [0.5, 4.0], "the silence at the end counts"
    found = Gaps.of([0.1] * 999 + [0.4])
    assert (found.count, found.median, found.worst) == (1000, 100.0, 400.0)
    assert found.p999 == 100.0


class Server:
    """Takes uploads, and answers with what it was told to."""

    def __init__(self, *, stale: int | None = None, refused: int | None = None) -> None:
        self.stale, self.refused = stale, refused
        self.uploads: list[str] = []
        self.uses: list[str] = []

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        body = (await request.aread()).decode(errors="replace")
        await asyncio.sleep(0)
        if request.url.path == "/v1/adapters":
            name = body.split('name="name"')[1].split()[0]
            if len(self.uploads) == self.refused:
                self.refused = None
                return httpx.Response(429, json={"error": {"message": "full"}})
            self.uploads.append(name)
            return httpx.Response(201, json={"version": 3})
        name = json.loads(body)["model"]
        assert name in self.uploads, "used before it was taken"
        self.uses.append(name)
        version = 2 if len(self.uses) == self.stale else 3
        return httpx.Response(200, headers={"x-shoal-adapter": f"{name}@{version}"}, json={})


def plan_of(folder: Path) -> UploadPlan:
    folder.mkdir(exist_ok=True)
    for name, data in files().items():
        (folder / name).write_bytes(data)
    return UploadPlan(
        base_url="http://test",
        api_key=None,
        folders=(folder,),
        prefix="p-",
        first=5,
        count=20,
        rate=2000.0,
        prompt=(1,),
    )


def upload(
    folder: Path, respond: Callable[[httpx.Request], Awaitable[httpx.Response]]
) -> UploadsDone:
    plan = plan_of(folder)

    async def go() -> UploadsDone:
        transport = httpx.MockTransport(respond)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await upload_steadily(client, plan)

    return asyncio.run(go())


def test_a_plan_on_its_way_to_the_other_process_does_not_hold_up_the_streams(
    tmp_path: Path,
) -> None:
    """The adapters went with it once: 88 MB, 60 ms that looked like a pause of the server's."""
    assert len(pickle.dumps(plan_of(tmp_path / "a"))) < 1000


def test_each_upload_is_used_once_it_was_taken(tmp_path: Path) -> None:
    server = Server()
    done = upload(tmp_path / "a", server)
    assert sorted(server.uploads) == sorted(server.uses) == sorted(f"p-{n}" for n in range(5, 25))
    assert (done.usable, done.failed, len(done.upload_ms), len(done.use_ms)) == (20, 0, 20, 20)
    assert done.seconds >= 19 / 2000.0


def test_an_answer_of_another_version_is_not_usable(tmp_path: Path) -> None:
    done = upload(tmp_path / "a", Server(stale=4))
    assert (done.usable, done.failed) == (19, 1)
    assert "must be of p-" in done.errors[0]


def test_a_refused_upload_is_counted_and_the_others_go_on(tmp_path: Path) -> None:
    done = upload(tmp_path / "a", Server(refused=7))
    assert (done.usable, done.failed) == (19, 1)
    assert "HTTP 429: full" in done.errors[0]


def test_a_stream_notes_when_its_events_come(tmp_path: Path) -> None:
    """Against a socket: two answers, then an error."""
    answers = [
        [b'data: {"a": 1}\n\n', b'data: {"a": 2}\n\n', b"data: [DONE]\n\n"],
        [b'data: {"a": 3}\n\n', b'data: {"error": "gone"}\n\n'],
    ]
    heads: list[bytes] = []
    closed: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split()[0])
        body = json.loads(await reader.readexactly(length))
        assert (body["model"], body["prompt"], body["stream"]) == ("m", [1, 2], True)
        heads.append(head)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        for event in answers.pop(0):
            writer.write(event)
            await writer.drain()
            await asyncio.sleep(0.01)
        writer.close()
        await writer.wait_closed()
        closed.append(head)

    async def go() -> Stream:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        stream = Stream("m", (1, 2), 4)
        async with server:
            await stream.listen(f"http://127.0.0.1:{port}", "key")
            while len(closed) < 2:
                await asyncio.sleep(0.01)
        return stream

    stream = asyncio.run(asyncio.wait_for(go(), 60))
    assert b"Authorization: Bearer key" in heads[0]
    assert [len(arrivals) for arrivals in stream.answers] == [2, 2]
    assert "gone" in (stream.error or "")
