"""Every route, for every role, on everybody's adapters: who may what, and what nobody learns."""

import hashlib
import itertools
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from fastapi import FastAPI
from tests.server.http.conftest import Parts

from shoal.adapters.blending import Blend
from shoal.adapters.registry.catalog import Content
from shoal.adapters.registry.database import Database
from shoal.adapters.registry.keys import Keys, Limits
from shoal.adapters.registry.registry import Registry
from shoal.adapters.registry.store import open_store
from shoal.adapters.spec import AdapterSpec
from shoal.server.http.uploads import Uploads

pytestmark = pytest.mark.anyio


class RegistryLibrary:
    """The real registry with its names, owners and shares; an adapter is what was uploaded."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        for name in ("resolve", "list", "versions", "activate", "delete", "count"):
            setattr(self, name, getattr(registry, {"list": "page"}.get(name, name)))
        for name in ("tag", "share", "unshare", "grantees"):
            setattr(self, name, getattr(registry, name))
        self.list_shared = registry.shared_page

    def upload(self, name: str, files: Mapping[str, Path], **whose: Any) -> Any:
        record = b"".join(files[key].read_bytes() for key in sorted(files))
        digest = hashlib.sha256(record).hexdigest()
        content = Content(digest, "core", "lora_xs", 4, len(record), 64, None)
        return self._registry.publish(name, content, record, **whose)

    def stage(self, info: Any) -> AdapterSpec:
        return AdapterSpec(info.digest, "core", info.rank, info.basis_id, info.packed_elements)

    def stage_resident(self, info: Any) -> AdapterSpec | None:
        return None

    def stage_blend(self, blend: Blend[Any]) -> AdapterSpec:
        return AdapterSpec(blend.digest, "core", 4, None, 64)

    def unstage(self, spec: AdapterSpec) -> None:
        pass


WHO = ("nobody", "stranger", "reader", "ann", "bob", "admin")


@dataclass
class House:
    """A server with two tenants, a read-only key of the first, and an admin.

    Ann has ``poem``, which Bob sees, and ``diary``, which he does not.
    """

    client: httpx.AsyncClient
    parts: Parts
    keys: Keys
    secrets: dict[str, str] = field(default_factory=dict)

    async def ask(self, who: str, method: str, path: str, **request: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.secrets[who]}"} if who != "nobody" else {}
        return await self.client.request(method, path, headers=headers, **request)

    async def upload(self, who: str, name: str, content: bytes = b"new") -> httpx.Response:
        files = [("file", ("adapter_config.json", b"{}")), ("file", ("adapter_model", content))]
        return await self.ask(who, "POST", "/v1/adapters", data={"name": name}, files=files)

    async def ask_about(
        self, name: str, who: str, route: tuple[str, str], asked: dict[str, Any]
    ) -> httpx.Response:
        """Ask a route of ``MATRIX`` about the adapter ``name``."""
        if "upload" in asked:
            return await self.upload(who, name)
        method, path = route
        url = path.replace("{name}", name).replace("{model}", name).replace("{grantee}", "carl")
        body = asked.get("json")
        if body and "model" in body:
            body = body | {"model": name}
        return await self.ask(who, method, url, json=body)

    async def complete(self, who: str, model: str) -> httpx.Response:
        body = {"model": model, "prompt": "hello", "max_tokens": 2}
        return await self.ask(who, "POST", "/v1/completions", json=body)


Open = Callable[..., AbstractAsyncContextManager[House]]


@pytest.fixture
def house(build: Callable[..., Parts], tmp_path: Path) -> Iterator[Open]:
    databases: list[Database] = []

    @asynccontextmanager
    async def start(**fields: object) -> AsyncIterator[House]:
        folder = tmp_path / str(len(databases))
        database = Database(f"sqlite:///{folder / 'r.db'}")
        databases.append(database)
        registry = Registry(database, open_store(str(folder / "store")), base_digest="b" * 64)
        parts = build(library=RegistryLibrary(registry), keys=registry.keys, **fields)
        transport = httpx.ASGITransport(parts.app, raise_app_exceptions=False)
        async with (
            parts.app.router.lifespan_context(parts.app),
            httpx.AsyncClient(transport=transport, base_url="http://shoal") as client,
        ):
            house = House(client, parts, registry.keys)
            yield house
        registry.close()

    yield start
    for database in databases:
        database.close()


async def furnish(house: House) -> None:
    for who, role, owner in (
        ("ann", "tenant", "ann"),
        ("reader", "read-only", "ann"),
        ("bob", "tenant", "bob"),
        ("admin", "admin", ""),
    ):
        house.secrets[who] = house.keys.create(role=role, owner=owner)[1]  # type: ignore[arg-type]
    house.secrets["stranger"] = house.secrets["ann"][:-1] + "-"
    for name in ("poem", "diary"):
        assert (await house.upload("ann", name, name.encode())).status_code == 201
        assert (await house.upload("ann", name, name.encode() + b"2")).status_code == 201
    shared = await house.ask("ann", "PUT", "/v1/adapters/poem/shares/bob")
    assert shared.status_code == 204


# What each of WHO gets. `name` stands for Ann's adapter as that one would write it: `poem` or
# `diary` to Ann and her reader, `ann/poem` or `ann/diary` to all others.
NO_KEY = (401, 401)
Expected = tuple[int, int, int, int]  # reader, ann, bob, admin
JSON = {"model": "base", "prompt": "hello", "max_tokens": 2}
CHAT = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}

ALL: Expected = (200, 200, 200, 200)
WRITE = (403, 200, 404, 200)
WRITE_204 = (403, 204, 404, 204)

# (method, route) -> (what is asked, for `poem` that Bob sees, for `diary` that he does not)
MATRIX: dict[tuple[str, str], tuple[dict[str, Any], Expected, Expected]] = {
    ("GET", "/v1/models"): ({}, ALL, ALL),
    ("GET", "/v1/models/{model}"): ({}, ALL, (200, 200, 404, 200)),
    ("POST", "/v1/chat/completions"): ({"json": CHAT}, ALL, (200, 200, 404, 200)),
    ("POST", "/v1/completions"): ({"json": JSON}, ALL, (200, 200, 404, 200)),
    ("POST", "/tokenize"): (
        {"json": {"model": "base", "prompt": "x"}},
        ALL,
        (200, 200, 404, 200),
    ),
    ("POST", "/detokenize"): (
        {"json": {"model": "base", "tokens": [5]}},
        ALL,
        (200, 200, 404, 200),
    ),
    ("POST", "/v1/adapters"): ({"upload": True}, (403, 201, 400, 201), (403, 201, 400, 201)),
    ("GET", "/v1/adapters"): ({}, ALL, ALL),
    ("GET", "/v1/adapters/{name}/versions"): ({}, ALL, (200, 200, 404, 200)),
    ("POST", "/v1/adapters/{name}/activate"): ({"json": {"version": 1}}, WRITE, WRITE),
    ("PUT", "/v1/adapters/{name}/tags"): ({"json": {"tags": {"a": "b"}}}, WRITE, WRITE),
    ("GET", "/v1/adapters/{name}/shares"): (
        {},
        (200, 200, 404, 200),
        (200, 200, 404, 200),
    ),
    ("PUT", "/v1/adapters/{name}/shares/{grantee}"): ({}, WRITE_204, WRITE_204),
    ("DELETE", "/v1/adapters/{name}/shares/{grantee}"): ({}, WRITE_204, WRITE_204),
    ("GET", "/v1/adapters/{name}"): ({}, ALL, (200, 200, 404, 200)),
    ("DELETE", "/v1/adapters/{name}"): ({}, WRITE_204, WRITE_204),
    # They read the server's disk, which is nobody's but the admin's; and none is configured.
    ("POST", "/v1/load_lora_adapter"): (
        {"json": {"lora_name": "x", "lora_path": "x"}},
        (403, 403, 403, 403),
        (403, 403, 403, 403),
    ),
    ("POST", "/v1/unload_lora_adapter"): (
        {"json": {"lora_name": "x"}},
        (403, 403, 403, 403),
        (403, 403, 403, 403),
    ),
    ("GET", "/metrics"): ({}, (403, 403, 403, 200), (403, 403, 403, 200)),
}
DELETE = ("DELETE", "/v1/adapters/{name}")
# Answered without a key.
OPEN = {("GET", "/health"), ("GET", "/version")}


def routes(app: FastAPI) -> set[tuple[str, str]]:
    paths = app.openapi()["paths"]
    return {(method.upper(), path) for path, methods in paths.items() for method in methods}


async def test_the_matrix_has_every_route(house: Open) -> None:
    async with house() as h:
        assert routes(h.parts.app) == set(MATRIX) | OPEN


@pytest.mark.parametrize("route", MATRIX, ids=" ".join)
async def test_who_may_do_what(house: Open, route: tuple[str, str]) -> None:
    asked, for_shared, for_private = MATRIX[route]
    async with house() as h:
        await furnish(h)
        for adapter, expected in (("poem", for_shared), ("diary", for_private)):
            for who, status in zip(WHO, (*NO_KEY, *expected), strict=True):
                name = adapter if who in ("ann", "reader") else f"ann/{adapter}"
                response = await h.ask_about(name, who, route, asked)
                assert response.status_code == status, (who, name, response.text)
                if route == DELETE and (who, status) == ("ann", 204):
                    await h.upload("ann", adapter)  # for the next one


@pytest.mark.parametrize("path", ["/metrics%0A", "/%6Detrics%0A", "/metrics/", "//metrics"])
async def test_metrics_are_an_admins_however_their_path_is_written(house: Open, path: str) -> None:
    async with house() as h:
        await furnish(h)
        await h.complete("ann", "diary")
        for who, expected in (("nobody", (401,)), ("reader", (403, 404)), ("bob", (403, 404))):
            response = await h.ask(who, "GET", path)
            assert response.status_code in expected, (who, response.text)
            assert "diary" not in response.text


async def test_open_routes_tell_nothing_of_tenants(house: Open) -> None:
    async with house() as h:
        await furnish(h)
        for _, path in OPEN:
            response = await h.ask("nobody", "GET", path)
            assert response.status_code == 200
            assert "ann" not in response.text


async def test_what_is_not_visible_answers_like_what_does_not_exist(house: Open) -> None:
    """The same status, headers and body, but for the name that was asked for."""
    async with house() as h:
        await furnish(h)
        for route, (asked, _, expected) in MATRIX.items():
            if expected[2] == 200:
                continue  # it is not about one adapter
            answers = []
            for reference in ("ann/diary", "ann/dairy", "eve/diary"):
                response = await h.ask_about(reference, "bob", route, asked)
                headers = {k: v for k, v in response.headers.items() if k != "content-length"}
                body = response.text.replace(reference, "NAME")
                answers.append((response.status_code, headers, body))
            assert answers[0] == answers[1] == answers[2], route
            assert answers[0][0] >= 400


async def test_nothing_of_a_tenant_is_in_anothers_answers(house: Open) -> None:
    async with house() as h:
        await furnish(h)
        await h.complete("ann", "diary")
        seen = []
        for path in ("/v1/models", "/v1/adapters", "/v1/adapters?shared=true", "/health"):
            response = await h.ask("bob", "GET", path)
            assert response.status_code == 200
            seen.append(response.text)
        assert "diary" not in "".join(seen)
        assert [m["id"] for m in (await h.ask("bob", "GET", "/v1/models")).json()["data"]] == [
            "base",
            "ann/poem",
        ]
        shared = (await h.ask("bob", "GET", "/v1/adapters?shared=true")).json()["data"]
        assert [(one["name"], one["owner"]) for one in shared] == [("ann/poem", "ann")]
        assert not {"tags", "used"} & set(shared[0])
        taken = await h.upload("bob", "diary", b"his own")
        assert (taken.status_code, taken.json()["version"]) == (201, 1)
        assert (await h.complete("bob", "diary")).headers["x-shoal-adapter"] == "diary@1"
        assert (await h.complete("bob", "ann/poem")).headers["x-shoal-adapter"] == "ann/poem@2"
        assert (await h.complete("ann", "ann/poem@1")).headers["x-shoal-adapter"] == "poem@1"
        metrics = (await h.ask("admin", "GET", "/metrics")).text
        assert 'adapter="ann/diary"' in metrics
        assert 'tenant="bob"' in metrics


async def test_a_page_of_models_goes_on_from_ones_own_to_those_shared(house: Open) -> None:
    async with house() as h:
        await furnish(h)
        for name in ("b1", "b2"):
            assert (await h.upload("bob", name)).status_code == 201
        for name in ("song", "aria"):
            await h.upload("ann", name)
            await h.ask("ann", "PUT", f"/v1/adapters/{name}/shares/*")
        every = ["base", "b1", "b2", "ann/aria", "ann/poem", "ann/song"]
        for limit in range(1, 8):
            seen: list[str] = []
            query: dict[str, Any] = {"limit": limit}
            for _ in range(10):
                page = (await h.ask("bob", "GET", "/v1/models", params=query)).json()
                seen += [model["id"] for model in page["data"]]
                assert len(page["data"]) <= limit
                if not page["has_more"]:
                    break
                query["after"] = page["last_id"]
            assert seen == every, limit


async def test_a_blend_is_of_what_its_caller_sees(house: Open) -> None:
    async with house() as h:
        await furnish(h)
        assert (await h.upload("bob", "song")).status_code == 201

        async def blend(who: str, name: str) -> httpx.Response:
            parts = [{"name": "song", "weight": 0.5}, {"name": name, "weight": 2}]
            return await h.ask(who, "POST", "/v1/completions", json=JSON | {"adapters": parts})

        response = await blend("bob", "ann/poem@1")
        assert response.headers["x-shoal-adapter"] == "song@1*0.5,ann/poem@1*2"
        answers = []
        for reference in ("ann/diary", "ann/dairy", "eve/diary", "poem"):
            refused = await blend("bob", reference)
            answers.append((refused.status_code, refused.text.replace(reference, "NAME")))
        assert len(set(answers)) == 1
        assert answers[0][0] == 404
        # Bob's song is as little there for Ann.
        assert (await blend("ann", "poem")).json()["error"]["param"] == "adapters[0].name"


async def test_a_share_ends_when_it_is_taken_back(house: Open) -> None:
    async with house() as h:
        await furnish(h)
        assert (await h.complete("bob", "ann/poem")).status_code == 200
        grantees = (await h.ask("ann", "GET", "/v1/adapters/poem/shares")).json()["data"]
        assert grantees == [{"owner": "bob"}]
        await h.ask("ann", "DELETE", "/v1/adapters/poem/shares/bob")
        assert (await h.complete("bob", "ann/poem")).status_code == 404


async def test_an_admin_acts_for_owners(house: Open) -> None:
    async with house() as h:
        await furnish(h)
        made = await h.upload("admin", "bob/gift")
        assert made.status_code == 201
        assert (made.json()["name"], made.json()["owner"]) == ("bob/gift", "bob")
        assert (await h.complete("bob", "gift")).status_code == 200
        listed = (await h.ask("admin", "GET", "/v1/adapters?owner=ann")).json()["data"]
        assert [one["name"] for one in listed] == ["ann/diary", "ann/poem"]
        assert (await h.ask("ann", "GET", "/v1/adapters?owner=ann")).status_code == 200
        assert (await h.ask("ann", "GET", "/v1/adapters?owner=bob")).status_code == 403
        assert (await h.ask("ann", "GET", "/v1/adapters?owner=")).status_code == 403


async def test_a_revoked_key_is_refused_soon(house: Open) -> None:
    async with house() as h:
        await furnish(h)
        assert (await h.complete("bob", "base")).status_code == 200
        ids = {key.owner: key.id for key in h.keys.page()[0] if key.role == "tenant"}
        h.keys.revoke(ids["bob"])
        assert (await h.complete("bob", "base")).status_code == 401
        assert (await h.complete("ann", "base")).status_code == 200


async def test_without_keys_everything_is_open_until_there_is_one(house: Open) -> None:
    async with house() as h:
        h.secrets["guest"] = "EMPTY"
        assert (await h.upload("guest", "mine")).status_code == 201
        assert (await h.complete("nobody", "mine")).status_code == 200
        assert (await h.ask("nobody", "GET", "/metrics")).status_code == 200
    async with house() as h:
        h.keys.create(role="tenant", owner="ann")
        assert (await h.complete("nobody", "base")).status_code == 401
        assert (await h.ask("nobody", "GET", "/metrics")).status_code == 401


async def test_a_key_of_the_command_line_is_an_admin_beside_tenants(house: Open) -> None:
    async with house(api_key=("static",)) as h:
        h.secrets["static"] = "static"
        assert (await h.ask("nobody", "GET", "/metrics")).status_code == 200, "no tenants yet"
    async with house(api_key=("static",)) as h:
        await furnish(h)
        h.secrets["static"] = "static"
        assert (await h.complete("static", "ann/diary")).status_code == 200
        assert (await h.ask("static", "GET", "/metrics")).status_code == 200
        assert (await h.ask("nobody", "GET", "/metrics")).status_code == 401


# Unicode look-alikes, paths, SQL, and what a header or a URL could be broken with.
HOSTILE = (
    "../../x",
    "..%2f..%2fx",
    "a/b/c",
    "ann/../bob/x",
    "Poem",
    "p\u043eem",  # a Cyrillic o
    "poem\u200b",
    "poem\x00",
    "poem\r\nx-shoal-adapter: other",
    "x' OR '1'='1",
    "x'; DROP TABLE adapters; --",
    "{{7*7}}",
    "%s%s%s%n",
    "/etc/passwd",
    "\\\\host\\share",
    "-rf",
    ".hidden",
    "*",
    "ann/*",
    "shoal/x",
    "",
    "a" * 129,
)


async def test_hostile_names_do_nothing(house: Open) -> None:
    async with house() as h:
        await furnish(h)
        before = (await h.ask("ann", "GET", "/v1/adapters")).json()
        for name, who in itertools.product(HOSTILE, ("ann", "bob")):
            response = await h.upload(who, name)
            assert response.status_code == 400, (name, response.text)
            assert response.json()["error"]["param"] == "name"
            answer = await h.complete(who, name)
            assert answer.status_code in (400, 404), (name, answer.text)
        assert (await h.ask("ann", "GET", "/v1/adapters")).json() == before


async def test_a_name_of_ten_megabytes_is_refused_before_it_is_kept(house: Open) -> None:
    async with house() as h:
        await furnish(h)
        response = await h.upload("ann", "a" * 10_000_000)
        assert response.status_code == 400
        assert len(response.content) < 1000
        assert (await h.complete("ann", "a" * 10_000_000)).status_code == 413


async def test_a_tenant_has_no_more_than_its_keys_limits(house: Open) -> None:
    async with house() as h:
        await furnish(h)
        for who, limits in (
            ("often", Limits(requests_per_minute=2)),
            ("much", Limits(tokens_per_minute=10)),
            ("shut", Limits(concurrent_requests=0)),
            ("small", Limits(adapters=1, bytes=9)),
        ):
            h.secrets[who] = h.keys.create(role="tenant", owner=who, limits=limits)[1]
        assert (await h.complete("often", "base")).status_code == 200
        assert (await h.upload("often", "mine")).status_code == 201
        refused = await h.complete("often", "base")
        assert refused.status_code == 429
        assert 0 < int(refused.headers["retry-after"]) <= 30
        assert "2 requests a minute" in refused.json()["error"]["message"]
        assert (await h.upload("often", "mine")).status_code == 429
        for path, body in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [5]})):
            assert (await h.ask("often", "POST", path, json=body)).status_code == 429
        # 5 of the prompt and 2 of the answer, twice.
        assert [(await h.complete("much", "base")).status_code for _ in range(3)] == [200, 200, 429]
        assert (await h.complete("shut", "base")).status_code == 429
        assert (await h.complete("ann", "base")).status_code == 200
        assert (await h.upload("small", "one", b"123")).status_code == 201
        assert (await h.upload("small", "two", b"123")).status_code == 403
        assert (await h.upload("small", "one", b"12345")).status_code == 403, "bytes of both"
        assert (await h.upload("admin", "small/two", b"123")).status_code == 201
        # Whatever became of a request, it is no longer in progress.
        assert not any(account.started for account in h.parts.services.quotas._owners.values())


@pytest.mark.parametrize("stream", [False, True])
async def test_what_the_engine_refuses_is_not_counted(house: Open, stream: bool) -> None:
    async with house(max_waiting=2) as h:
        limits = Limits(requests_per_minute=8, tokens_per_minute=1000)
        h.secrets["ann"] = h.keys.create(role="tenant", owner="ann", limits=limits)[1]
        body = {"model": "base", "prompt": "x" * 98, "max_tokens": 2, "stream": stream}
        statuses: list[int] = []

        async def ask() -> None:
            response = await h.ask("ann", "POST", "/v1/completions", json=body)
            statuses.append(response.status_code)

        h.parts.gate.close()
        with anyio.fail_after(20):
            async with anyio.create_task_group() as tasks:
                for _ in range(8):
                    tasks.start_soon(ask)
                while len(statuses) < 4:
                    await anyio.sleep(0.001)
                h.parts.gate.open()
        served = statuses.count(200)
        assert sorted(set(statuses)) == [200, 429]
        account = h.parts.services.quotas._owners["ann"]
        assert account.requests.out <= served
        assert account.tokens.out <= 100 * served


async def test_uploads_under_way_are_bounded_for_all_and_for_each(house: Open) -> None:
    arrived = anyio.Event()
    go_on = anyio.Event()

    async def slowly() -> AsyncIterator[bytes]:
        yield b"--b\r\n"
        arrived.set()
        await go_on.wait()
        yield b"--b--\r\n"

    async with house() as h:
        await furnish(h)
        h.parts.services.uploads = Uploads(most=2, most_of_one=1)
        statuses: dict[str, int] = {}

        async def upload(who: str) -> None:
            headers = {"Authorization": f"Bearer {h.secrets[who]}"} | {
                "content-type": "multipart/form-data; boundary=b"
            }
            answer = await h.client.post("/v1/adapters", content=slowly(), headers=headers)
            statuses[who] = answer.status_code

        async with anyio.create_task_group() as tasks:
            for who in ("ann", "bob"):
                tasks.start_soon(upload, who)
            await arrived.wait()
            for _ in range(100):
                if h.parts.services.uploads.under_way == 2:
                    break
                await anyio.sleep(0.05)
            for who in ("ann", "admin"):
                refused = await h.upload(who, "more")
                assert refused.status_code == 429
                assert refused.headers["retry-after"] == "1"
            go_on.set()
        assert statuses == {"ann": 400, "bob": 400}  # there was nothing in them
        assert h.parts.services.uploads.under_way == 0
        assert (await h.upload("ann", "more")).status_code == 201


async def test_a_tenants_prompt_is_not_found_in_anothers_cache(house: Open) -> None:
    async with house() as h:
        await furnish(h)
        body = {"model": "base", "prompt": "x" * 100, "max_tokens": 2}
        cached = []
        for who in ("ann", "ann", "bob", "reader"):
            answer = await h.ask(who, "POST", "/v1/completions", json=body)
            cached.append(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])
        assert cached[0] == cached[2] == 0
        assert cached[1] > 0
        assert cached[3] > 0, "another key of the same tenant"
