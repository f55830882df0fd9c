"""``shoal adapters`` against the app: what its verbs ask for, print and refuse."""

import argparse
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from tests.server.http.conftest import Parts
from tests.server.http.test_http_tenants import RegistryLibrary

from shoal.adapters.registry import catalog
from shoal.adapters.registry.catalog import Content
from shoal.adapters.registry.database import Database
from shoal.adapters.registry.registry import Registry
from shoal.adapters.registry.store import open_store
from shoal.server.cli import adapters

Run = Callable[..., int]


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    database = Database(f"sqlite:///{tmp_path / 'r.db'}")
    registry = Registry(database, open_store(str(tmp_path / "store")), base_digest="b" * 64)
    yield registry
    registry.close()


@pytest.fixture
def run(build: Callable[..., Parts], registry: Registry, monkeypatch: pytest.MonkeyPatch) -> Run:
    """``run(secret, "list")`` is ``shoal adapters list --api-key secret``; its exit code."""

    def client(base_url: str, headers: dict[str, str], timeout: float) -> TestClient:
        parts = build(library=RegistryLibrary(registry), keys=registry.keys)
        return TestClient(parts.app, base_url, headers=headers)

    monkeypatch.setattr(adapters.httpx, "Client", client)

    def start(secret: str, *arguments: str) -> int:
        parser = argparse.ArgumentParser()
        adapters.add_arguments(parser)
        return adapters.run(parser.parse_args([*arguments, "--api-key", secret]))

    return start


@pytest.fixture
def ann(registry: Registry) -> str:
    return registry.keys.create(role="tenant", owner="ann")[1]


@pytest.fixture
def bob(registry: Registry) -> str:
    return registry.keys.create(role="tenant", owner="bob")[1]


def folder(path: Path, content: str) -> str:
    path.mkdir()
    for name in adapters.FILES:
        (path / name).write_text(content)
    return str(path)


def test_an_adapters_life(
    run: Run, ann: str, bob: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: str, who: str = ann, code: int = 0) -> str:
        assert run(who, *arguments) == code
        out, err = capsys.readouterr()
        return (out + err).strip()

    assert said("list") == "no adapters"
    assert said("push", "poem", folder(tmp_path / "1", "one")).startswith("poem@1  core r=4")
    assert said("push", "poem", folder(tmp_path / "2", "two")).startswith("poem@2 ")
    assert said("activate", "poem", "1").startswith("poem@1 ")
    assert [line[:7] for line in said("show", "poem").splitlines()] == ["*poem@1", " poem@2"]
    assert said("tag", "poem", "lang=fr", "team=a=b") == "lang=fr team=a=b"
    assert said("tag", "poem") == "no tags"
    assert said("share", "poem") == "poem is shared with nobody"
    assert said("share", "poem", "bob") == "poem is shared with bob"
    assert said("list", "--shared", who=bob).startswith("ann/poem@1 ")
    assert said("show", "ann/poem", who=bob).startswith("*ann/poem@1")
    assert "does not exist" in said("rm", "ann/poem", who=bob, code=1)
    assert said("unshare", "poem", "bob") == "poem is no longer shared with bob"
    assert "does not exist" in said("show", "ann/poem", who=bob, code=1)
    assert said("rm", "poem") == "deleted poem"
    assert said("list") == "no adapters"


def test_an_admin_lists_page_by_page(
    run: Run, registry: Registry, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    content = Content(sha256(b"bytes").hexdigest(), "core", "lora_xs", 4, 5, 64, None)
    for name in ("a", "b", "c"):
        registry.publish(name, content, b"bytes", owner="ann")
    monkeypatch.setattr(catalog, "PAGE_MAX", 2)
    admin = registry.keys.create(role="admin", owner="")[1]
    assert run(admin, "list", "--owner", "ann") == 0
    listed = [line.split("@")[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == ["ann/a", "ann/b", "ann/c"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("show", "../models"), "no adapter name"),
        (("show", "ann/../x"), "no adapter name"),
        (("share", "poem", "../x"), "no owner"),
        (("tag", "poem", "lang"), "write KEY=VALUE"),
        (("list", "--owner", "ann"), "HTTP 403"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    run: Run, bob: str, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], says: str
) -> None:
    assert run(bob, *arguments) == 1
    assert says in capsys.readouterr().err
