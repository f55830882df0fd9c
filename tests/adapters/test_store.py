"""The store: whole or absent, verified, and the same bytes only once."""

import errno
import hashlib
import os
import time
from pathlib import Path

import pytest

from shoal.adapters.registry.errors import RecordDamaged, RegistryUnavailable
from shoal.adapters.registry.store import LocalStore, Store, open_store, places


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(params=["path", "file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    url = {
        "path": f"{tmp_path}/a store",
        "file": f"file://{tmp_path}/store",
        "memory": f"memory://{tmp_path.name}-{request.node.name}",
    }[request.param]
    return open_store(url)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_bytes_come_back_by_digest(store: Store) -> None:
    for data in (b"", b"x", os.urandom(100_000)):
        digest = digest_of(data)
        assert not store.exists(digest)
        store.put(digest, data)
        store.put(digest, data)
        assert store.exists(digest)
        assert store.get(digest) == data


def test_what_is_deleted_is_gone_and_may_be_deleted_again(store: Store) -> None:
    digest = digest_of(b"x")
    store.put(digest, b"x")
    store.delete(digest)
    store.delete(digest)
    assert not store.exists(digest)
    with pytest.raises(RecordDamaged, match=f"{digest} is missing"):
        store.get(digest)
    store.put(digest, b"x")
    assert store.get(digest) == b"x"


def test_a_digest_of_other_bytes_is_our_bug(store: Store) -> None:
    with pytest.raises(AssertionError):
        store.put(digest_of(b"x"), b"y")
    for name in ("../../etc/passwd", "", "A" * 64, "a" * 63):
        with pytest.raises(AssertionError):
            store.get(name)


@pytest.mark.parametrize("damage", [b"", b"other bytes of that", b"some byte", b"some bytes "])
def test_damage_is_noticed_and_mended_by_the_same_upload(tmp_path: Path, damage: bytes) -> None:
    store = LocalStore(tmp_path)
    digest = digest_of(b"some bytes")
    store.put(digest, b"some bytes")
    [path] = files(tmp_path)
    path.write_bytes(damage)
    with pytest.raises(RecordDamaged, match=f"{digest} is damaged"):
        store.get(digest)
    store.put(digest, b"some bytes")
    assert store.get(digest) == b"some bytes"


def test_records_are_sharded_and_nothing_else_is_left(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    digest = digest_of(b"x")
    store.put(digest, b"x")
    assert files(tmp_path) == [tmp_path / "records" / digest[:2] / digest[2:4] / digest]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_is_typed_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    store = LocalStore(tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(RegistryUnavailable, match="No space left"):
            store.put(digest_of(b"x"), b"x")
    assert files(tmp_path) == []
    assert not store.exists(digest_of(b"x"))


def test_only_old_leftovers_of_dead_writers_are_removed(tmp_path: Path) -> None:
    LocalStore(tmp_path)
    old, new = tmp_path / "temporary" / "old", tmp_path / "temporary" / "new"
    for path in (old, new):
        path.write_bytes(b"half")
    week_ago = time.time() - 7 * 24 * 3600
    os.utime(old, (week_ago, week_ago))
    LocalStore(tmp_path)
    assert files(tmp_path) == [new]


@pytest.mark.parametrize("url", ["nosuch://x", "/proc/none/store"])
def test_a_place_that_cannot_be_a_store_is_refused(url: str) -> None:
    with pytest.raises(RegistryUnavailable):
        open_store(url)


def test_files_lie_beside_the_registry_by_default(tmp_path: Path) -> None:
    found = places(f"sqlite:///{tmp_path}/registry.db")
    assert found.store_url == f"{tmp_path}/registry.db.store"
    assert found.bases == tmp_path / "registry.db.store" / "bases"

    found = places(f"sqlite:///{tmp_path}/registry.db", f"file://{tmp_path}/elsewhere")
    assert found.bases == tmp_path / "elsewhere" / "bases"

    found = places(f"sqlite:///{tmp_path}/registry.db", "memory://bucket/adapters")
    assert found.store_url == "memory://bucket/adapters"
    assert found.bases == tmp_path / "registry.db.bases"

    found = places("sqlite://")
    assert Path(found.store_url).is_dir()


def test_a_registry_without_a_file_must_be_told_where() -> None:
    with pytest.raises(RegistryUnavailable, match="not a SQLite file"):
        places("postgresql://host/shoal", None)


@pytest.mark.parametrize("url", ["", "registry.db", "sqlite:/registry.db", "a://b:c/d"])
def test_what_is_not_a_url_is_explained(url: str) -> None:
    with pytest.raises(RegistryUnavailable, match="--registry needs a SQLAlchemy URL such as"):
        places(url)


def test_sqlite_uris_name_the_file_or_the_memory_that_sqlite_means(tmp_path: Path) -> None:
    found = places(f"sqlite:///file:{tmp_path}/r.db?mode=rwc&uri=true")
    assert found.store_url == f"{tmp_path}/r.db.store"
    for url in ("sqlite:///file::memory:?uri=true", "sqlite:///file:x?mode=memory&uri=true"):
        found = places(url)
        assert not found.bases.is_relative_to(Path.cwd())
