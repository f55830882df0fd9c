"""The adapter routes: upload, replace, roll back, delete, list; and vLLM's two."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shoal.adapters.errors import AdapterTooLarge
from shoal.adapters.registry.errors import RegistryUnavailable

pytestmark = pytest.mark.anyio

Serve = Callable[..., Any]


async def test_an_upload_is_usable_replaceable_and_reversible(serve: Serve) -> None:
    async with serve() as h:
        made = await h.upload("poet", b"first")
        assert made.status_code == 201
        first = made.json()
        assert first.items() >= {"name": "poet", "version": 1, "family": "core", "rank": 4}.items()
        assert (await h.complete(model="poet")).headers["x-shoal-adapter"] == "poet@1"
        assert (await h.upload("poet", b"second")).json()["version"] == 2
        assert (await h.complete(model="poet")).headers["x-shoal-adapter"] == "poet@2"
        same = await h.upload("poet", b"first")
        assert (same.status_code, same.json()["version"]) == (201, 1)
        moved = await h.client.post("/v1/adapters/poet/activate", json={"version": 2})
        assert moved.json()["version"] == 2
        history = (await h.client.get("/v1/adapters/poet/versions")).json()["data"]
        assert [(v["version"], v["active"]) for v in history] == [(1, False), (2, True)]
        assert (await h.client.get("/v1/adapters/poet")).json()["digest"] == history[1]["digest"]
        assert (await h.client.delete("/v1/adapters/poet")).status_code == 204
        assert (await h.client.get("/v1/adapters/poet")).status_code == 404
        assert (await h.client.delete("/v1/adapters/poet")).status_code == 404
        assert (await h.complete(model="poet")).status_code == 404
        assert not any(folder.exists() for folder in h.library.folders)


async def test_a_request_in_flight_keeps_its_version(serve: Serve) -> None:
    async with serve() as h:
        await h.upload("poet", b"first")
        old = h.library.resolve("poet").digest
        prompt = h.tokenizer.encode("hello")
        asked = {"model": "poet", "max_tokens": 60, "ignore_eos": True, "return_token_ids": True}
        h.gate.close()
        import anyio

        found: list[Any] = []

        async def run() -> None:
            found.append(await h.complete(**asked))

        async with anyio.create_task_group() as group:
            group.start_soon(run)
            while not h.library.staged:
                await anyio.sleep(0.001)
            await h.upload("poet", b"second")
            await h.client.delete("/v1/adapters/poet")
            h.gate.open()
        assert found[0].json()["choices"][0]["token_ids"] == h.runner.expected(prompt, old, 60)


async def test_refusals_have_the_librarys_words_and_their_status(serve: Serve) -> None:
    async with serve() as h:
        bad = await h.upload("poet", b"bad tensors")
        name = await h.upload("Poet!")
        reserved = await h.upload("base")
        version = await h.client.post("/v1/adapters/poet/activate", json={"version": 0})
        nobody = await h.client.post("/v1/adapters/poet/activate", json={"version": 1})
        assert h.library.count() == 0
        metrics = (await h.client.get("/metrics")).text
    assert bad.status_code == 422
    assert bad.json()["error"]["message"] == "layers.0.q_proj.R: must be finite"
    assert name.status_code == 400
    assert name.json()["error"]["param"] == "name"
    assert reserved.status_code == 409
    assert reserved.json()["error"]["param"] == "name"
    assert version.status_code == 400
    assert version.json()["error"]["param"] == "version"
    assert nobody.status_code == 404
    assert 'shoal:adapter_uploads_total{model_name="base",outcome="refused"} 3.0' in metrics


def part(name: str, content: bytes, filename: str | None = None) -> bytes:
    shown = f'; filename="{filename}"' if filename is not None else ""
    return f'--B\r\nContent-Disposition: form-data; name="{name}"{shown}\r\n\r\n'.encode() + (
        content + b"\r\n"
    )


GOOD = part("name", b"poet") + part("file", b"{}", "adapter_config.json")


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (GOOD, "closing boundary"),
        (part("name", b"poet") + b"--B--\r\n", "file"),
        (part("file", b"{}", "a.json") + b"--B--\r\n", "name"),
        (part("name", b"x") + GOOD + b"--B--\r\n", "name"),
        (part("name", b"x") + part("name", b"y") + b"never read" * 9, "`name` was sent twice"),
        (GOOD + part("file", b"{}", "adapter_config.json") + b"--B--\r\n", "twice"),
        (GOOD + part("other", b"x") + b"--B--\r\n", "other"),
        (part("name", b"x" * 5000) + b"--B--\r\n", "longer"),
        (GOOD + b"".join(part("file", b"", f"f{i}") for i in range(16)) + b"--B--\r\n", "16"),
        (b"garbage", "multipart"),
        (b"", "closing boundary"),
        (b"--B\r\nContent-Disposition: " + b"x" * 10_000, "multipart"),
        *(
            (GOOD + part("file", b"", name) + b"--B--\r\n", "plain name")
            for name in (
                "../x",
                "/etc/passwd",
                "a/b",
                "a\\\\b",
                "..",
                "",
                "C:\\x",
                "a\0b",
                "n" * 256,
            )
        ),
    ],
)
async def test_a_broken_form_is_a_400_and_leaves_nothing(
    serve: Serve, body: bytes, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    async with serve() as h:
        headers = {"content-type": "multipart/form-data; boundary=B"}
        response = await h.client.post("/v1/adapters", content=body, headers=headers)
        assert response.status_code == 400, response.text
        assert word in response.json()["error"]["message"]
        assert h.library.count() == 0
        assert list(tmp_path.glob("shoal-uploads-*/upload-*")) == []


@pytest.mark.parametrize("what", ["spool.tempfile.mkdtemp", "uploads._Form._open"])
async def test_a_disk_that_cannot_keep_an_upload_is_a_503(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/tmp/secret")

    async with serve() as h:
        with monkeypatch.context() as patch:
            patch.setattr(f"shoal.server.http.{what}", full)
            response = await h.upload("poet")
        assert response.status_code == 503
        assert response.headers["retry-after"]
        assert "secret" not in response.text
        assert (await h.upload("poet")).status_code == 201


async def test_an_upload_that_is_no_form_is_a_400(serve: Serve) -> None:
    async with serve() as h:
        for kind in ("application/json", "multipart/form-data", "text/plain", ""):
            response = await h.client.post(
                "/v1/adapters", content=b"{}", headers={"content-type": kind}
            )
            assert response.status_code == 400


async def test_an_upload_over_its_limit_is_a_413_and_leaves_nothing(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    async def pieces() -> Any:
        yield part("name", b"poet") + part("file", b"", "a")[:-2]
        for _ in range(100):
            yield b"x" * 100

    async with serve(max_upload_bytes=1000, max_body_bytes=100) as h:
        headers = {"content-type": "multipart/form-data; boundary=B"}
        over = await h.upload("poet", b"x" * 1001)
        counted = await h.client.post("/v1/adapters", content=pieces(), headers=headers)
        declared = await h.upload("poet", b"x" * 1_000_000)
        fine = await h.upload("poet", b"x" * 900)
        assert list(tmp_path.glob("shoal-uploads-*/upload-*")) == []
    assert [r.status_code for r in (over, counted, declared, fine)] == [413, 413, 413, 201]


async def test_no_room_for_an_adapter_is_a_429_that_can_be_tried_again(serve: Serve) -> None:
    async with serve() as h:
        await h.upload("poet")

        def full(info: object) -> object:
            raise AdapterTooLarge("host tier is full of pinned adapters")

        h.library.stage = full
        response = await h.complete(model="poet")
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) >= 1


async def test_a_registry_that_is_away_is_a_503_without_its_url(serve: Serve) -> None:
    async with serve() as h:

        def away(model: str, *, owner: str = "") -> object:
            raise RegistryUnavailable("postgresql://user:password@host/db")

        h.library.resolve = away
        response = await h.complete(model="poet")
    assert response.status_code == 503
    assert "password" not in response.text


async def test_models_list_the_base_first_then_pages_of_adapters(serve: Serve) -> None:
    async with serve() as h:
        for name in ("c", "a", "b"):
            await h.upload(name)
        whole = (await h.client.get("/v1/models")).json()
        assert [m["id"] for m in whole["data"]] == ["base", "a", "b", "c"]
        assert whole["has_more"] is False
        assert whole["data"][0]["parent"] is None
        assert whole["data"][1]["parent"] == "base"
        assert whole["data"][1]["root"] == "a@1"
        for limit in (1, 2, 3):
            seen, query = [], {"limit": limit}
            while True:
                page = (await h.client.get("/v1/models", params=query)).json()
                assert 0 < len(page["data"]) <= limit
                seen += [m["id"] for m in page["data"]]
                if not page["has_more"]:
                    break
                query["after"] = page["last_id"]
            assert seen == ["base", "a", "b", "c"]
        assert (await h.client.get("/v1/models/a@1")).json()["id"] == "a@1"
        assert (await h.client.get("/v1/models/base")).json()["id"] == "base"
        assert (await h.client.get("/v1/models/nobody")).status_code == 404
        for query in ({"limit": 0}, {"limit": 1001}, {"limit": "x"}):
            refused = await h.client.get("/v1/models", params=query)
            assert refused.status_code == 400
            assert refused.json()["error"]["param"] == "limit"


async def test_adapters_are_listed_by_prefix_and_page(serve: Serve) -> None:
    async with serve() as h:
        for name in ("u1.a", "u1.b", "u2.a"):
            await h.upload(name)
        page = (await h.client.get("/v1/adapters", params={"prefix": "u1.", "limit": 1})).json()
        assert ([a["name"] for a in page["data"]], page["has_more"]) == (["u1.a"], True)
        query = {"prefix": "u1.", "after": "u1.a"}
        rest = (await h.client.get("/v1/adapters", params=query)).json()
        assert ([a["name"] for a in rest["data"]], rest["has_more"]) == (["u1.b"], False)


async def test_vllms_load_is_off_without_a_root(serve: Serve, tmp_path: Path) -> None:
    async with serve() as h:
        body = {"lora_name": "poet", "lora_path": str(tmp_path)}
        for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
            response = await h.client.post(
                path, json=body if "un" not in path else {"lora_name": "x"}
            )
            assert response.status_code == 403
            assert "--lora-root" in response.json()["error"]["message"]


async def test_vllms_load_reads_inside_its_root_only(serve: Serve, tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root / "poet", root / "empty", root / "sly", outside):
        folder.mkdir(parents=True)
    for folder in (root / "poet", outside):
        (folder / "adapter_config.json").write_text("{}")
    (root / "poet" / "metrics.jsonl").write_text("not part of it")
    (root / "link").symlink_to(outside)
    (root / "sly" / "adapter_config.json").symlink_to(outside / "adapter_config.json")
    async with serve(lora_root=str(root)) as h:

        async def load(path: str) -> Any:
            body = {"lora_name": "poet", "lora_path": path}
            return await h.client.post("/v1/load_lora_adapter", json=body)

        for path in ("../outside", str(outside), "link", "sly", "poet/../../outside", "/etc"):
            assert (await load(path)).status_code == 403, path
        for path in ("missing", "empty", "poet/adapter_config.json", "a\0b", "x" * 4000):
            assert (await load(path)).status_code == 400, path
        assert h.library.count() == 0
        for path in ("poet", str(root / "poet")):
            done = await load(path)
            assert done.status_code == 200
            assert done.text == "Success: LoRA adapter 'poet' added successfully."
        assert (await h.complete(model="poet")).status_code == 200
        gone = await h.client.post("/v1/unload_lora_adapter", json={"lora_name": "poet"})
        assert gone.text == "Success: LoRA adapter 'poet' removed successfully."
        assert h.library.count() == 0
