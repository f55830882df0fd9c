"""``shoal adapters VERB --registry``: every owner and base, without a server."""

import hashlib
from pathlib import Path

import pytest
from tests.adapters.databases import database, database_url, postgres

from shoal.adapters.registry.catalog import Catalog, Content
from shoal.adapters.registry.database import Database
from shoal.server.__main__ import main

__all__ = ["database", "database_url", "postgres"]

BASE, OTHER = "b" * 64, "c" * 64


def publish(database: Database, name: str, text: str, *, owner: str = "", base: str = BASE) -> None:
    digest = hashlib.sha256(text.encode()).hexdigest()
    content = Content(digest, "lora", "lora", 8, 100, 1024, None)
    Catalog(database, base_digest=base, owner=owner).publish(name, content, created=1e9)


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line.split()[0] for line in capsys.readouterr().out.splitlines()]


def test_all_owners_and_bases_are_listed_shown_and_changed(
    database_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    database = Database(database_url)
    for text in ("1", "2"):
        publish(database, "tea", text)
    publish(database, "tea", "3", owner="acme")
    publish(database, "coffee", "4", base=OTHER)
    where = ["--registry", database_url]
    assert main(["adapters", "list", *where]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()] == ["tea@2", "acme/tea@1", "coffee@1"]
    assert "base cccccccccccc" in out
    assert main(["adapters", "list", "--prefix", "co", *where]) == 0
    assert said(capsys) == ["coffee@1"]
    assert main(["adapters", "list", "--owner", "acme", *where]) == 0
    assert said(capsys) == ["acme/tea@1"]
    assert main(["adapters", "list", "--shared", *where]) == 2
    assert main(["adapters", "activate", "tea", "1", *where]) == 0
    assert main(["adapters", "show", "tea", *where]) == 0
    assert said(capsys) == ["tea@1", "*tea@1", "tea@2"]
    assert Catalog(database, base_digest=BASE).get("tea").version == 1
    assert main(["adapters", "rm", "coffee", *where]) == 0
    assert main(["adapters", "rm", "acme/tea", *where]) == 0
    capsys.readouterr()
    assert main(["adapters", "list", *where]) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("tea@1  lora r=8  100 bytes")
    database.close()


def test_tags_and_shares(database_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    database = Database(database_url)
    publish(database, "tea", "3", owner="acme")
    publish(database, "milk", "4")
    where = ["--registry", database_url]
    for words, says in (
        (["tag", "acme/tea", "lang=fr"], "lang=fr"),
        (["tag", "acme/tea"], "no tags"),
        (["share", "acme/tea", "globex"], "acme/tea is shared with globex"),
        (["share", "acme/tea", "*"], "acme/tea is shared with *, globex"),
        (["unshare", "acme/tea", "*"], "acme/tea is no longer shared with *"),
        (["share", "acme/tea"], "acme/tea is shared with globex"),
    ):
        assert main(["adapters", *words, *where]) == 0
        assert capsys.readouterr().out.strip() == says
    seen = Catalog(database, base_digest=BASE, owner="globex").shared_page(limit=9)[0]
    assert [info.reference for info in seen] == ["acme/tea"]
    assert main(["adapters", "share", "milk", "globex", *where]) == 1, "it has no owner"
    assert main(["adapters", "tag", "milk", "lang", *where]) == 1
    assert "KEY=VALUE" in capsys.readouterr().err
    database.close()


@pytest.mark.parametrize(
    "words",
    [
        ("tag", "coffee", "a=b"),
        ("share", "coffee", "acme"),
        ("show", "coffee"),
        ("show", "acme/tea"),
        ("show", "../x"),
        ("activate", "tea", "3"),
        ("activate", "tea", "-1"),
        ("rm", "x" * 300),
    ],
)
def test_what_is_not_there_is_said_and_nothing_changes(
    tmp_path: Path, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"sqlite:///{tmp_path}/r.db"
    database = Database(url)
    publish(database, "tea", "1")
    assert main(["adapters", *words, "--registry", url]) == 1
    assert "does not exist" in capsys.readouterr().err
    assert Catalog(database, base_digest=BASE).get("tea").version == 1
    database.close()


def test_a_registry_that_is_not_there_is_not_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapters", "list", "--registry", f"sqlite:///{tmp_path}/none.db"]) == 1
    assert "no registry at" in capsys.readouterr().err
    assert list(tmp_path.glob("none*")) == []
    assert main(["adapters", "list", "--registry", "nosuch://"]) == 1
