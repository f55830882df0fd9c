"""Export and import: everything arrives, again is nothing, and half an archive is half of it."""

import hashlib
import io
import json
import random
import subprocess
import sys
import tarfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.adapters.errors import AdapterRejected
from shoal.adapters.registry import archive
from shoal.adapters.registry.archive import export_archive, import_archive
from shoal.adapters.registry.catalog import Catalog, Content
from shoal.adapters.registry.database import Database
from shoal.adapters.registry.doctor import examine
from shoal.adapters.registry.errors import RegistryUnavailable
from shoal.adapters.registry.store import LocalStore

BASE = "b" * 64


OPENED: list[Database] = []


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    while OPENED:
        OPENED.pop().close()


class Place:
    """A registry in a folder, with the parts that an archive needs."""

    def __init__(self, folder: Path, url: str | None = None) -> None:
        self.folder = folder
        self.database = Database(url or f"sqlite:///{folder}/r.db")
        OPENED.append(self.database)
        self.store = LocalStore(folder / "store")
        self.bases = folder / "store" / "bases"

    def catalog(self, owner: str = "", base: str = BASE) -> Catalog:
        return Catalog(self.database, base_digest=base, owner=owner)

    def publish(self, name: str, data: bytes, owner: str = "", base: str = BASE) -> None:
        digest = hashlib.sha256(data).hexdigest()
        self.store.put(digest, data)
        content = Content(digest, "core", "lora_xs", 4, len(data), 3360, "b" * 64)
        self.catalog(owner, base).publish(name, content, created=1.5)

    def exported(self) -> bytes:
        out = io.BytesIO()
        export_archive(self.database, self.store, self.bases, out)
        return out.getvalue()

    def imported(self, data: bytes) -> tuple[int, int, int, int]:
        got = import_archive(self.database, self.store, self.bases, io.BytesIO(data))
        return got.added, got.updated, got.unchanged, got.refused


@pytest.fixture
def full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(archive, "BATCH_ADAPTERS", 7)
    place = Place(tmp_path / "full")
    rng = random.Random(0)
    for n in range(30):
        for _ in range(rng.randrange(1, 4)):
            place.publish(f"a{n}", b"%d" % rng.randrange(10**6), owner=rng.choice(["", "acme"]))
    place.publish("other-base", b"x", base="c" * 64)
    place.publish("back", b"1")
    place.publish("back", b"2")
    place.catalog().activate("back", 1)
    place.publish("gone", b"3")
    place.catalog().delete("gone", now=2.0)
    place.publish("shared", b"4", owner="acme")
    place.catalog("acme").share("shared", "other")
    place.catalog("acme").tag("shared", {"team": "x"})
    place.bases.mkdir()
    basis = b"a basis"
    (place.bases / f"{hashlib.sha256(basis).hexdigest()}.safetensors").write_bytes(basis)
    return place


def contents(place: Place) -> dict[str, object]:
    found: dict[str, object] = {}
    for owner, base in (("", BASE), ("acme", BASE), ("", "c" * 64)):
        catalog = place.catalog(owner, base)
        infos, _ = catalog.page(limit=1000)
        for info in infos:
            versions = catalog.versions(info.name)
            found[f"{owner}/{info.name}"] = versions
            for version in versions:
                assert place.store.get(version.digest)
    return found


def test_a_registry_arrives_whole(full: Place, tmp_path: Path, database_url: str) -> None:
    data = full.exported()
    other = Place(tmp_path / "other", database_url)
    added, *rest = other.imported(data)
    assert rest == [0, 0, 0]
    assert contents(other) == contents(full)
    assert len(contents(other)) == added
    assert other.catalog().get("back").version == 1
    assert other.catalog("other").get("acme/shared").tags == {"team": "x"}
    assert [p.read_bytes() for p in other.bases.iterdir()] == [b"a basis"]
    assert list(other.store.records()) == []  # all packed
    other.catalog().check()
    assert other.imported(data) == (0, 0, added, 0)
    report = examine(other.database, other.store, other.bases, repair=True, grace_s=-60)
    assert report.missing.count == report.orphans.count == report.removed_packs == 0
    onward = Place(tmp_path / "onward")
    assert onward.imported(other.exported())[0] == added
    assert contents(onward) == contents(full)
    # What comes next counts on.
    other.publish("back", b"9")
    assert other.catalog().get("back").version == 3


def test_importing_again_changes_nothing(full: Place, tmp_path: Path) -> None:
    data = full.exported()
    other = Place(tmp_path / "other")
    added, *_ = other.imported(data)
    before = contents(other), sorted((other.folder / "store").rglob("*"))
    assert other.imported(data) == (0, 0, added, 0)
    assert (contents(other), sorted((other.folder / "store").rglob("*"))) == before
    assert full.imported(data) == (0, 0, added, 0)


def damage(path: Path) -> None:
    path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))


def lost(place: Place) -> int:
    """Records of which the doctor says that they are missing or damaged."""
    report = examine(place.database, LocalStore(place.folder / "store"), place.bases)
    return report.missing.count + report.damaged.count


def mended(place: Place, data: bytes) -> int:
    store = LocalStore(place.folder / "store")
    got = import_archive(place.database, store, place.bases, io.BytesIO(data), mend=True)
    assert (got.added, got.updated) == (0, 0)
    return got.mended


def test_what_was_lost_is_imported_again_when_asked(full: Place) -> None:
    data, before = full.exported(), contents(full)
    records = full.folder / "store" / "records"
    files = sorted(path for path in records.rglob("*") if path.is_file())
    for path in files[::3]:
        path.unlink()
    for path in [*files[1::3], *full.bases.iterdir()]:
        damage(path)
    count = lost(full)
    assert count > 10
    assert full.imported(data)[:2] == (0, 0)
    assert lost(full) == count, "only when asked"
    assert [mended(full, data) for _ in range(2)] == [count, 0]
    assert lost(full) == 0
    assert contents(full) == before
    assert [path.read_bytes() for path in full.bases.iterdir()] == [b"a basis"]


def test_damage_in_packs_is_mended_too(full: Place, tmp_path: Path) -> None:
    data = full.exported()
    other = Place(tmp_path / "other")
    other.imported(data)
    for pack in sorted((other.folder / "store" / "packs").iterdir())[::2]:
        damage(pack)
    count = lost(other)
    assert count > 10
    assert [mended(other, data) for _ in range(2)] == [count, 0]
    assert lost(other) == 0
    assert contents(other) == contents(full)


@pytest.mark.parametrize("seed", range(8))
def test_an_import_that_was_cut_off_is_resumed(full: Place, tmp_path: Path, seed: int) -> None:
    data = full.exported()
    other = Place(tmp_path / "other")
    cut = random.Random(seed).randrange(len(data.rstrip(b"\0")))
    with pytest.raises(AdapterRejected, match="archive"):
        other.imported(data[:cut])
    half = contents(other)
    assert half.items() <= contents(full).items()
    added, _, unchanged, _ = other.imported(data)
    assert (added, unchanged) == (len(contents(full)) - len(half), len(half))
    assert contents(other) == contents(full)


def test_an_archive_that_ends_between_two_batches_is_not_whole(full: Place, tmp_path: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(full.exported())) as tar:
        names = tar.getnames()
        files = {name: tar.extractfile(name).read() for name in names[:4]}  # type: ignore[union-attr]
    assert names[3] == "records/00000000.pack"
    with pytest.raises(AdapterRejected, match="cut off"):
        Place(tmp_path / "other").imported(tar_of(**files))


def test_a_disk_that_fills_up_loses_nothing_that_was_acknowledged(
    full: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = full.exported()
    other = Place(tmp_path / "other")
    put_many, calls = LocalStore.put_many, []

    def full_later(self: LocalStore, records: list[tuple[str, bytes]]) -> str:
        calls.append(len(records))
        if len(calls) == 3:
            raise RegistryUnavailable("No space left on device")
        return put_many(self, records)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "put_many", full_later)
        with pytest.raises(RegistryUnavailable):
            other.imported(data)
    assert 0 < len(contents(other)) < len(contents(full))
    other.imported(data)
    assert contents(other) == contents(full)


def test_a_known_name_gets_a_new_version_and_keeps_its_own(full: Place, tmp_path: Path) -> None:
    other = Place(tmp_path / "other")
    other.publish("back", b"mine")
    other.publish("gone", b"mine")
    other.publish("other-base", b"mine")
    _, updated, _, refused = other.imported(full.exported())
    assert (updated, refused) == (1, 1)
    digests = [info.digest for info in other.catalog().versions("back")]
    assert digests == [hashlib.sha256(data).hexdigest() for data in (b"mine", b"1")]
    assert other.catalog().get("gone").version == 1
    other.catalog().check()


def test_an_adapter_whose_bytes_are_gone_is_left_out_and_counted(full: Place) -> None:
    full.store.delete(hashlib.sha256(b"2").hexdigest())
    got = export_archive(full.database, full.store, full.bases, io.BytesIO())
    assert got.left_out == 1
    assert got.adapters == len(contents_names(full)) - 1


def contents_names(place: Place) -> list[str]:
    pages = [
        place.catalog(o, b).page(limit=1000)[0]
        for o, b in (("", BASE), ("acme", BASE), ("", "c" * 64))
    ]
    return [info.name for page in pages for info in page]


def tar_of(**files: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


HEAD = json.dumps({"format": 1, "adapters": 0}).encode()
LINE = {
    "owner": "",
    "name": "a",
    "base": BASE,
    "active": 1,
    "tags": {},
    "grantees": [],
    "versions": [
        {
            "version": 1,
            "created": 1.0,
            "source": "upload",
            "digest": "d" * 64,
            "family": "core",
            "format": "lora_xs",
            "rank": 4,
            "bytes": 1,
            "packed_elements": 1,
            "basis_id": None,
        }
    ],
}


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"shoal.json": b"{}"},
        {"shoal.json": json.dumps({"format": 2, "adapters": 1}).encode()},
        {"shoal.json": HEAD, "../../etc/passwd": b"x"},
        {"shoal.json": HEAD, "bases/../../x.safetensors": b"x"},
        {"shoal.json": HEAD, f"bases/{'a' * 64}.safetensors": b"not that"},
        {"shoal.json": HEAD, "records/00000000.pack": b""},
        {"shoal.json": HEAD, "adapters/00000000.jsonl": b"", "end.json": b"{}"},
        *(
            {
                "shoal.json": HEAD,
                "adapters/00000000.jsonl": json.dumps(LINE | change).encode(),
                "records/00000000.pack": b"shoalpk1",
            }
            for change in (
                {},  # the record is not there
                {"name": "../x"},
                {"name": "Ａ"},
                {"owner": "a'; drop table adapters; --"},
                {"owner": None},
                {"active": 2},
                {"versions": []},
                {"versions": [LINE["versions"][0] | {"rank": "4"}]},  # type: ignore[index]
                {"versions": [LINE["versions"][0] | {"family": "x"}]},  # type: ignore[index]
                {"versions": [LINE["versions"][0] | {"version": 0}], "active": 0},  # type: ignore[index]
                {"tags": 5},
                {"base": "x"},
            )
        ),
    ],
)
def test_what_is_not_an_archive_is_refused_and_does_nothing(
    tmp_path: Path, files: dict[str, bytes]
) -> None:
    place = Place(tmp_path / "r")
    with pytest.raises(AdapterRejected):
        place.imported(tar_of(**files))
    assert contents(place) == {}
    assert [p.name for p in tmp_path.rglob("*") if p.is_file() and "r.db" not in p.name] == []


@pytest.mark.parametrize("data", [b"", b"x", b"\0" * 2048])
def test_what_is_not_a_tar_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(AdapterRejected, match="archive"):
        Place(tmp_path).imported(data)


def test_links_in_a_tar_are_refused(tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        member = tarfile.TarInfo("shoal.json")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)
    with pytest.raises(AdapterRejected, match="does not belong here"):
        Place(tmp_path).imported(out.getvalue())


# Forks one import for each step, which kills itself before that call of those that matter.
IMPORTER = textwrap.dedent(
    """
    import itertools, os, signal, sys
    from pathlib import Path
    from shoal.adapters.registry import archive
    from shoal.adapters.registry.database import Database
    from shoal.adapters.registry.store import LocalStore

    source, folder, *steps = sys.argv[1:]
    archive.BATCH_ADAPTERS = 7

    def die_before(step):
        calls = itertools.count(1)
        def deadly(function):
            def wrapped(*args, **kwargs):
                if next(calls) == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)
            return wrapped
        for owner, name in [(os, "fsync"), (os, "replace"), (Database, "transact"),
                            (archive, "publish_many"), (archive, "missing")]:
            setattr(owner, name, deadly(getattr(owner, name)))

    for step in steps:
        pid = os.fork()
        if pid == 0:
            place = Path(folder, step)
            place.mkdir()
            database, store = Database(f"sqlite:///{place}/r.db"), LocalStore(place / "store")
            die_before(int(step))
            with open(source, "rb") as file:
                archive.import_archive(database, store, place / "store/bases", file)
            os._exit(1)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    """
)


def test_kill_9_during_an_import_leaves_whole_adapters_and_the_rest_follows(
    full: Place, tmp_path: Path
) -> None:
    data = full.exported()
    (tmp_path / "all.tar").write_bytes(data)
    steps = [str(step) for step in (1, 2, 3, 4, 5, 6, 7, 9, 12, 16, 21)]
    command = [sys.executable, "-c", IMPORTER, str(tmp_path / "all.tar"), str(tmp_path), *steps]
    subprocess.run(command, check=True, timeout=120)
    whole = contents(full)
    found = []
    for step in steps:
        place = Place(tmp_path / step)
        half = contents(place)  # every record of every name is there
        assert half.items() <= whole.items()
        found.append(len(half))
        added, _, unchanged, _ = place.imported(data)
        assert (added, unchanged) == (len(whole) - len(half), len(half))
        assert contents(place) == whole
        report = examine(place.database, place.store, place.bases, repair=True, grace_s=-60)
        assert report.records > 0
        assert report.missing.count == report.torn_packs.count == 0
        assert contents(place) == whole
    assert found == sorted(found)
    assert found[0] == 0
    assert found[-1] > 0
