"""The doctor finds what is wrong, and never removes what somebody refers to or is putting."""

import hashlib
import os
import random
import time
from pathlib import Path

import pytest

from shoal.adapters.registry.catalog import Catalog, Content
from shoal.adapters.registry.database import Database
from shoal.adapters.registry.doctor import GRACE_S, Report, examine
from shoal.adapters.registry.errors import RecordDamaged
from shoal.adapters.registry.store import LocalStore, Store, open_store

BASIS = b"a basis"
BASIS_ID = hashlib.sha256(BASIS).hexdigest()
LATER = time.time() + 2 * GRACE_S


class Clinic:
    """A registry with a doctor."""

    def __init__(self, folder: Path, store_url: str | None = None) -> None:
        self.folder = folder
        self.store: Store = open_store(store_url or f"{folder}/store")
        self.database = Database(f"sqlite:///{folder}/r.db")
        self.bases = folder / "bases"
        self.bases.mkdir()
        (self.bases / f"{BASIS_ID}.safetensors").write_bytes(BASIS)
        self.catalog = Catalog(self.database, base_digest="b" * 64)

    def publish(self, name: str, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        content = Content(digest, "core", "lora_xs", 4, len(data), 3360, BASIS_ID)
        self.catalog.publish(name, content, created=1.0)
        return digest

    def put(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        self.store.put(digest, data)
        return digest

    def pack(self, *datas: bytes) -> list[str]:
        pairs = [(hashlib.sha256(data).hexdigest(), data) for data in datas]
        self.store.put_many(pairs)
        return [digest for digest, _ in pairs]

    def examine(self, *, repair: bool = False, now: float = LATER, read_all: bool = True) -> Report:
        return examine(
            self.database, self.store, self.bases, repair=repair, now=now, read_all=read_all
        )


@pytest.fixture(params=["local", "memory"])
def clinic(request: pytest.FixtureRequest, tmp_path: Path) -> Clinic:
    url = f"memory://{tmp_path.name}-{request.node.name}" if request.param == "memory" else None
    return Clinic(tmp_path, url)


def test_a_healthy_registry_is_healthy(clinic: Clinic) -> None:
    clinic.publish("a", b"1")
    clinic.put(b"1")
    clinic.publish("b", b"2")
    clinic.pack(b"2", b"3")
    clinic.publish("c", b"3")
    assert clinic.examine(repair=True) == Report(records=3)


def test_what_is_missing_is_named_and_mended_by_putting_it(clinic: Clinic) -> None:
    digest = clinic.publish("a", b"1")
    report = clinic.examine(repair=True)
    assert (report.missing.examples, report.healthy) == ([digest], False)
    clinic.put(b"1")
    assert clinic.examine().healthy


def test_damage_is_named(tmp_path: Path) -> None:
    clinic = Clinic(tmp_path)
    digest = clinic.publish("a", b"1")
    clinic.put(b"1")
    [path] = [p for p in (tmp_path / "store/records").rglob("*") if p.is_file()]
    path.write_bytes(b"2")
    assert clinic.examine(repair=True).damaged.examples == [digest]
    assert clinic.examine(read_all=False).healthy
    assert path.exists()  # the catalog refers to it


def test_of_several_copies_the_one_that_is_read_decides(tmp_path: Path) -> None:
    clinic = Clinic(tmp_path)
    digest = clinic.publish("a", b"1")
    clinic.put(b"1")
    clinic.pack(b"1", b"another")
    [path] = [p for p in (tmp_path / "store/records").rglob("*") if p.is_file()]
    path.write_bytes(b"2")  # is read before the pack
    with pytest.raises(RecordDamaged):
        clinic.store.get(digest)
    assert clinic.examine().damaged.examples == [digest]
    path.unlink()
    assert clinic.examine().healthy
    [pack] = (tmp_path / "store/packs").iterdir()
    data = pack.read_bytes()
    at = data.index(bytes.fromhex(digest)) + 40
    pack.write_bytes(data[:at] + b"2" + data[at + 1 :])
    assert clinic.examine().damaged.examples == [digest]
    assert clinic.examine(read_all=False).healthy
    clinic.pack(b"1", b"a third")
    assert clinic.store.get(digest) == b"1"
    assert clinic.examine().healthy


@pytest.mark.parametrize("read_all", [True, False])
def test_among_many_packed_records_it_finds_the_few(
    clinic: Clinic, monkeypatch: pytest.MonkeyPatch, read_all: bool
) -> None:
    monkeypatch.setattr("shoal.adapters.registry.packed.WINDOW_BYTES", 1000)
    monkeypatch.setattr("shoal.adapters.registry.doctor._PAGE", 7)
    rng = random.Random(0)
    datas = [rng.randbytes(100) for _ in range(60)]
    digests = [clinic.publish(f"a{n}", data) for n, data in enumerate(datas)]
    clinic.pack(*datas[:30])
    clinic.pack(*datas[20:48], b"nobody's")  # some twice
    for data in datas[48:55]:
        clinic.put(data)
    report = clinic.examine(read_all=read_all)
    assert report.records == 60
    assert sorted(report.missing.examples) == sorted(digests[55:])
    assert report == Report(records=60, missing=report.missing)


def test_bases_that_are_gone_or_other_bytes_are_named(clinic: Clinic) -> None:
    clinic.publish("a", b"1")
    clinic.put(b"1")
    (clinic.bases / f"{BASIS_ID}.safetensors").write_bytes(b"another")
    assert clinic.examine().missing_bases.examples == [BASIS_ID]
    (clinic.bases / f"{BASIS_ID}.safetensors").unlink()
    assert clinic.examine().missing_bases.examples == [BASIS_ID]


def test_only_old_orphans_are_removed_and_only_when_asked(clinic: Clinic) -> None:
    clinic.publish("a", b"1")
    kept, orphan = clinic.put(b"1"), clinic.put(b"2")
    assert clinic.examine(repair=True, now=time.time()).orphans.count == 0
    report = clinic.examine()
    assert (report.orphans.examples, report.removed_records) == ([orphan], 0)
    assert clinic.store.exists(orphan)
    assert clinic.examine(repair=True).removed_records == 1
    assert not clinic.store.exists(orphan)
    assert clinic.store.exists(kept)
    assert clinic.examine() == Report(records=1)


def test_what_waits_to_be_collected_is_left_to_the_collection(clinic: Clinic) -> None:
    digest = clinic.publish("a", b"1")
    clinic.put(b"1")
    clinic.catalog.delete("a", now=5.0)
    assert clinic.examine(repair=True).removed_records == 0
    clinic.catalog.forget([digest], older_than=10.0, remove_bytes=clinic.store.delete)
    assert not clinic.store.exists(digest)


def test_an_orphan_that_is_put_again_and_published_meanwhile_is_kept(clinic: Clinic) -> None:
    """The doctor has decided; then somebody uploads the same content."""
    digest = clinic.put(b"1")
    retire = clinic.store.retire_record
    before = time.time() + 0.01

    def late(digest: str, _: float) -> bool:
        time.sleep(0.02)
        clinic.put(b"1")
        clinic.publish("a", b"1")
        return retire(digest, before)

    clinic.store.retire_record = late  # type: ignore[method-assign]
    assert clinic.examine(repair=True).removed_records == 0
    assert clinic.store.get(digest) == b"1"


def test_what_dead_writers_left_goes_once_it_is_old(tmp_path: Path) -> None:
    clinic = Clinic(tmp_path)
    clinic.publish("a", b"1")
    clinic.put(b"1")
    left = [
        tmp_path / "store" / "temporary" / "half",
        clinic.bases / f".{BASIS_ID}.safetensors.x_y",
    ]
    for path in left:
        path.write_bytes(b"half")
    assert clinic.examine(repair=True, now=time.time()) == Report(records=1)
    found = clinic.examine()
    assert sorted(found.leftovers.examples) == sorted(map(str, left))
    assert found.healthy
    assert all(path.exists() for path in left)
    assert clinic.examine(repair=True).removed_leftovers == 2
    assert clinic.examine() == Report(records=1)


def test_of_a_torn_pack_everything_whole_is_rescued(tmp_path: Path) -> None:
    clinic = Clinic(tmp_path)
    datas = [b"%d" % n * 100 for n in range(10)]
    for n, data in enumerate(datas):
        clinic.publish(f"a{n}", data)
    clinic.pack(*datas, b"nobody's")
    [path] = (tmp_path / "store/packs").iterdir()
    path.write_bytes(path.read_bytes()[: 8 + 7 * 140 + 60])
    clinic.store = LocalStore(tmp_path / "store")  # a new process
    report = clinic.examine()
    assert (report.torn_packs.count, report.missing.count) == (1, 10)
    report = clinic.examine(repair=True)
    assert (report.removed_packs, report.rescued, report.missing.count) == (1, 7, 3)
    assert not path.exists()
    report = clinic.examine()
    assert (report.torn_packs.count, report.missing.count) == (0, 3)
    clinic.pack(*datas)
    assert clinic.examine().healthy


def test_a_pack_of_which_only_the_index_is_damaged_is_made_whole(tmp_path: Path) -> None:
    clinic = Clinic(tmp_path)
    digests = clinic.pack(b"1", b"2")
    clinic.publish("a", b"1")
    clinic.publish("b", b"2")
    [path] = (tmp_path / "store/packs").iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    clinic.store = LocalStore(tmp_path / "store")
    assert clinic.examine(repair=True).rescued == 2
    assert [clinic.store.get(digest) for digest in digests] == [b"1", b"2"]
    assert clinic.examine() == Report(records=2)


def test_a_pack_that_is_mostly_dead_is_rewritten(clinic: Clinic) -> None:
    datas = [b"%d" % n * 100 for n in range(10)]
    digests = clinic.pack(*datas)
    for n in range(4):
        clinic.publish(f"a{n}", datas[n])
    assert clinic.examine(repair=True, now=time.time()).dead_packs.count == 0
    report = clinic.examine(repair=True)
    assert (report.dead_packs.count, report.removed_packs, report.rescued) == (1, 1, 4)
    assert [clinic.store.exists(digest) for digest in digests] == [True] * 4 + [False] * 6
    assert clinic.examine(repair=True) == Report(records=4)


def test_a_pack_that_is_alive_is_left(clinic: Clinic) -> None:
    datas = [b"%d" % n * 100 for n in range(10)]
    clinic.pack(*datas)
    for n in range(6):
        clinic.publish(f"a{n}", datas[n])
    assert clinic.examine(repair=True) == Report(records=6)


def test_a_pack_that_only_holds_the_dead_goes(clinic: Clinic) -> None:
    [digest] = clinic.pack(b"1")
    assert clinic.examine(repair=True).removed_packs == 1
    with pytest.raises(RecordDamaged):
        clinic.store.get(digest)


@pytest.mark.parametrize("seed", range(5))
def test_whatever_happened_what_is_referred_to_is_never_lost(tmp_path: Path, seed: int) -> None:
    clinic, rng = Clinic(tmp_path), random.Random(seed)
    published: dict[str, bytes] = {}
    for n in range(60):
        data = b"%d" % rng.randrange(40) * 50
        action = rng.random()
        if action < 0.3:
            clinic.put(data)
        elif action < 0.5:
            clinic.pack(data, *(b"%d" % rng.randrange(40) * 50 for _ in range(5)))
        elif action < 0.8:
            digest = clinic.put(data)
            clinic.publish(f"n{n}", data)
            published[digest] = data
        else:
            clinic.examine(repair=True, now=rng.choice([time.time(), LATER]))
        for path in (tmp_path / "store").rglob("*.pack"):
            if rng.random() < 0.2:
                os.utime(path, (0, 0))
    report = clinic.examine(repair=True)
    assert report.healthy
    assert all(clinic.store.get(digest) == data for digest, data in published.items())
    assert clinic.examine().orphans.count == 0
