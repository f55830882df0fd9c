"""The library: upload to staged weights, with the real formats, registry and host tier."""

import errno
import gzip
import io
import os
import random
import shutil
import tempfile
import threading
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import update

from shoal.adapters import library as library_module
from shoal.adapters import preparing
from shoal.adapters.basis import Basis, BasisStore, compute_basis, make_basis
from shoal.adapters.errors import (
    AdapterConflict,
    AdapterError,
    AdapterNameInvalid,
    AdapterNotFound,
    AdapterQuotaExceeded,
    AdapterRejected,
    AdapterTooLarge,
)
from shoal.adapters.formats.writing import (
    write_compact_lora_xs,
    write_lora,
    write_miss,
    write_official_lora_xs,
)
from shoal.adapters.host_tier import HostTier
from shoal.adapters.library import AdapterInfo, AdapterLibrary, RegistryUnavailable, places
from shoal.adapters.reading import adapter_files
from shoal.adapters.registry import stored
from shoal.adapters.registry.archive import export_archive, import_archive
from shoal.adapters.registry.collecting import Collector
from shoal.adapters.registry.database import Database
from shoal.adapters.registry.errors import RecordDamaged
from shoal.adapters.registry.keys import Limits
from shoal.adapters.registry.registry import Registry
from shoal.adapters.registry.store import LocalStore, open_store
from shoal.adapters.registry.tables import GARBAGE
from shoal.adapters.spec import BaseShape, Dims, Family, Target
from shoal.adapters.weights import AdapterWeights, Correction

SHAPE = BaseShape(
    "tiny",
    "b" * 64,
    2,
    {
        "q_proj": Dims(16, 16),
        "k_proj": Dims(8, 16),
        "v_proj": Dims(8, 16),
        "o_proj": Dims(16, 16),
        "gate_proj": Dims(24, 16),
        "up_proj": Dims(24, 16),
        "down_proj": Dims(16, 24),
    },
)
_GENERATOR = torch.Generator().manual_seed(0)
WEIGHTS = {t: torch.randn(SHAPE.dims[t.module], generator=_GENERATOR) for t in SHAPE.targets()}
CANONICAL = compute_basis(WEIGHTS.__getitem__, SHAPE, 8)
KINDS: tuple[Family, ...] = ("core", "fold", "lora")

Open = Callable[..., AdapterLibrary]


def adapter(folder: Path, seed: int, family: Family = "core", basis: Basis = CANONICAL) -> Path:
    """An adapter directory; seeds and families differ in content."""
    directory = folder / f"{family}-{seed}-{basis.id[:8]}"
    if directory.exists():
        return directory
    rng = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=rng) * 0.1

    targets = [Target(0, "q_proj"), Target(1, "down_proj")]
    if family == "core":
        r = {t: draw(4, 4) for t in targets}
        write_compact_lora_xs(directory, r, alpha=8, rank=4, basis=basis, shape=SHAPE)
    elif family == "fold":
        d = {t: draw(4, SHAPE.dims[t.module].d_out) for t in targets}
        write_miss(directory, d, rank=4, shape=SHAPE)
    else:
        dims = {t: SHAPE.dims[t.module] for t in targets}
        ab = {t: (draw(4, dims[t].d_in), draw(dims[t].d_out, 4)) for t in targets}
        write_lora(directory, ab, alpha=8, rank=4, shape=SHAPE)
    return directory


def upload(library: AdapterLibrary, name: str, directory: Path) -> AdapterInfo:
    return library.upload(name, adapter_files(directory))


def names(library: AdapterLibrary) -> list[str]:
    return [info.name for info in library.list(limit=1000)[0]]


@pytest.fixture
def open_library(tmp_path: Path) -> Iterator[Open]:
    """Opens the test's one registry, as often as wanted: as one process after or beside another."""
    opened: list[AdapterLibrary] = []

    def open_it(**change: object) -> AdapterLibrary:
        url = f"sqlite:///{tmp_path}/registry.db"
        arguments: dict[str, object] = {
            "registry_url": url,
            "store_url": None,
            "shape": SHAPE,
            "weight_of": WEIGHTS.__getitem__,
            "canonical": CANONICAL,
            "bases": BasisStore(places(url).bases),
            "host": HostTier(1 << 20),
            "on_basis": lambda basis: None,
            "dtype": torch.float32,
            "reserved_names": frozenset({"tiny"}),
            "max_upload_bytes": 1 << 20,
            "shipped": None,
        }
        opened.append(AdapterLibrary.open(**(arguments | change)))  # type: ignore[arg-type]
        return opened[-1]

    yield open_it
    for library in opened:
        library.close()


@pytest.mark.parametrize("family", KINDS)
def test_a_restart_serves_the_same_bits_as_the_upload(
    open_library: Open, tmp_path: Path, family: Family
) -> None:
    before, after = HostTier(1 << 20), HostTier(1 << 20)
    library = open_library(host=before)
    info = upload(library, "a", adapter(tmp_path, 1, family))
    assert (info.name, info.version, info.active, info.rank) == ("a", 1, True, 4)
    assert info.family == family
    spec = library.stage(library.resolve("a"))
    restarted = open_library(host=after)
    assert restarted.resolve("a") == info
    assert restarted.stage(restarted.resolve("a")) == spec
    assert torch.equal(before.get(spec.digest).data, after.get(spec.digest).data)
    assert spec.packed_elements == info.packed_elements == after.get(spec.digest).data.numel()
    restarted.unstage(spec)
    library.unstage(spec)


def test_a_restart_packs_the_same_bits_also_without_parsing(
    open_library: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = HostTier(1 << 20)
    library = open_library(host=first)
    infos = [upload(library, f"a{seed}", adapter(tmp_path, seed)) for seed in range(4)]
    parsed = []
    from_record = library_module.from_record

    def counted(data: bytes, shape: BaseShape) -> AdapterWeights:
        parsed.append(data)
        return from_record(data, shape)

    monkeypatch.setattr(library_module, "from_record", counted)
    again = HostTier(1 << 20)
    announced: list[Basis] = []
    restarted = open_library(host=again, on_basis=announced.append)
    for count, info in enumerate(infos, start=1):
        spec = restarted.stage(info)
        kept, packed = first.get(info.digest), again.get(info.digest)
        assert (spec, packed.spec) == (kept.spec, kept.spec)
        assert torch.equal(packed.data.view(torch.int32), kept.data.view(torch.int32))
        assert [basis.id for basis in announced] == [CANONICAL.id] * count
    assert len(parsed) == 1


def test_an_upload_is_in_the_host_tier_when_it_returns(open_library: Open, tmp_path: Path) -> None:
    host = HostTier(1 << 20)
    info = upload(open_library(host=host), "a", adapter(tmp_path, 1))
    assert host.pin(info.digest)


def test_the_basis_is_announced_before_the_adapter_is_staged(
    open_library: Open, tmp_path: Path
) -> None:
    upload(open_library(), "a", adapter(tmp_path, 1))
    host = HostTier(1 << 20)
    told: list[tuple[str, int]] = []
    library = open_library(host=host, on_basis=lambda basis: told.append((basis.id, len(host))))
    spec = library.stage(library.resolve("a"))
    assert told[0] == (CANONICAL.id, 0)
    assert spec.basis_id == CANONICAL.id
    library.unstage(spec)


def test_an_adapter_outlives_the_canonical_basis_it_was_made_with(
    open_library: Open, tmp_path: Path
) -> None:
    upload(open_library(), "a", adapter(tmp_path, 1))
    # The cache was lost, and the basis is computed again at another rank.
    other = compute_basis(WEIGHTS.__getitem__, SHAPE, 6)
    assert other.id != CANONICAL.id
    told: list[str] = []
    library = open_library(canonical=other, on_basis=lambda basis: told.append(basis.id))
    spec = library.stage(library.resolve("a"))
    assert told == [spec.basis_id] == [CANONICAL.id]
    library.unstage(spec)


def upload_corrected(
    library: AdapterLibrary, basis: Basis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AdapterInfo:
    """A LoRA that was trained on a residual base; its format has kept the basis."""
    target = Target(1, "up_proj")
    correction = Correction("milora", basis.id, {target: 3}, {target: 1.0})
    factors = (torch.ones(2, 16), torch.ones(24, 2))
    weights = AdapterWeights(
        "lora", "lora", {target: factors}, {target: 1.0}, correction=correction
    )
    with monkeypatch.context() as patch:
        patch.setattr(library_module, "read_adapter", lambda files, **context: weights)
        return upload(library, "a", adapter(tmp_path, 1))


def test_the_basis_of_a_correction_is_announced_with_its_adapter(
    open_library: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    basis = make_basis(
        {t: f[:, :3].flip(1) for t, f in CANONICAL.factors.items()},
        kind="uploaded",
        base_digest=SHAPE.digest,
    )
    bases = BasisStore(places(f"sqlite:///{tmp_path}/registry.db").bases)
    bases.add(basis)
    before, after = HostTier(1 << 20), HostTier(1 << 20)
    told: list[tuple[str, int]] = []
    library = open_library(
        bases=bases, host=before, on_basis=lambda basis: told.append((basis.id, len(before)))
    )
    info = upload_corrected(library, basis, tmp_path, monkeypatch)
    assert (info.family, info.basis_id) == ("lora", None)
    assert told == [(basis.id, 0)], "before the engine can be asked to run it"
    told.clear()
    library = open_library(host=after, on_basis=lambda basis: told.append((basis.id, len(after))))
    spec = library.stage(library.resolve("a"))
    assert told == [(basis.id, 0)]
    assert [section.basis_id for section in spec.sections] == [basis.id, None]
    assert spec == before.get(info.digest).spec
    assert torch.equal(before.get(info.digest).data, after.get(info.digest).data)
    library.unstage(spec)


def test_a_corrected_adapter_outlives_the_canonical_basis_and_fails_alone_without_it(
    open_library: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload_corrected(open_library(), CANONICAL, tmp_path, monkeypatch)
    other = compute_basis(WEIGHTS.__getitem__, SHAPE, 6)
    told: list[str] = []
    library = open_library(canonical=other, on_basis=lambda basis: told.append(basis.id))
    library.unstage(library.stage(library.resolve("a")))
    assert told == [CANONICAL.id]
    (places(f"sqlite:///{tmp_path}/registry.db").bases / f"{CANONICAL.id}.safetensors").unlink()
    host = HostTier(1 << 20)
    library = open_library(canonical=other, host=host)
    with pytest.raises(RecordDamaged, match=f"basis {CANONICAL.id} is missing"):
        library.stage(library.resolve("a"))
    assert len(host) == 0, "what is in the host tier can be staged"


def upload_official(library: AdapterLibrary, name: str, tmp_path: Path) -> AdapterInfo:
    """An adapter that brings a basis of its own."""
    rng = torch.Generator().manual_seed(5)
    foreign = replace(
        CANONICAL,
        factors={
            t: torch.linalg.qr(torch.randn(f.shape[0], 4, generator=rng)).Q
            for t, f in CANONICAL.factors.items()
        },
    )
    r = {Target(0, "q_proj"): torch.eye(4)}
    write_official_lora_xs(
        tmp_path / "official",
        r,
        alpha=4,
        rank=4,
        basis=foreign,
        shape=SHAPE,
        weight_of=WEIGHTS.__getitem__,
    )
    info = upload(library, name, tmp_path / "official")
    assert info.family == "core"
    assert info.basis_id not in (None, CANONICAL.id)
    return info


def test_a_basis_that_another_process_accepted_is_found(open_library: Open, tmp_path: Path) -> None:
    told: list[str] = []
    one, two = open_library(), open_library(on_basis=lambda basis: told.append(basis.id))
    info = upload_official(one, "a", tmp_path)
    two.unstage(two.stage(two.resolve("a")))
    assert told == [info.basis_id]


def test_a_damaged_basis_fails_its_own_adapters_alone(open_library: Open, tmp_path: Path) -> None:
    info = upload_official(open_library(), "a", tmp_path)
    path = places(f"sqlite:///{tmp_path}/registry.db").bases / f"{info.basis_id}.safetensors"
    data = bytearray(path.read_bytes())
    data[-4] ^= 1  # the last bit of a value: still a basis, but not this one
    path.write_bytes(data)
    told: list[str] = []
    library = open_library(on_basis=lambda basis: told.append(basis.id))
    with pytest.raises(RecordDamaged, match=f"basis {info.basis_id} cannot be read: .* has sha256"):
        library.stage(library.resolve("a"))
    # Announced under another id, the engine would miss it in a step that others share.
    assert told == []


def test_concurrent_stages_of_one_adapter_load_it_once(
    open_library: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = upload(open_library(), "a", adapter(tmp_path, 1))
    host = HostTier(1 << 20)
    library = open_library(host=host)
    loads: list[str] = []
    read = Registry.read

    def slow_read(registry: Registry, digest: str) -> bytes:
        loads.append(digest)
        barrier.wait(timeout=10)  # while the others ask for it too
        return read(registry, digest)

    monkeypatch.setattr(Registry, "read", slow_read)
    barrier = threading.Barrier(2)
    with ThreadPoolExecutor(8) as pool:
        staged = [pool.submit(library.stage, info) for _ in range(8)]
        barrier.wait(timeout=10)
        specs = [future.result(timeout=10) for future in staged]
    assert loads == [info.digest]
    for spec in specs:
        library.unstage(spec)
    host.check()
    assert not library._loading._locks, "a lock outlived its users"


def test_an_open_library_removes_what_was_deleted_long_ago(
    open_library: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library_module, "Collector", partial(Collector, interval_s=0.02))
    library = open_library()
    for name, seed in (("old", 1), ("new", 2), ("kept", 3)):
        upload(library, name, adapter(tmp_path, seed))
    digests = {name: library.resolve(name).digest for name in ("old", "new", "kept")}
    library.delete("old")
    library.delete("new")
    database = Database(f"sqlite:///{tmp_path}/registry.db")
    with database.write() as connection:
        connection.execute(
            update(GARBAGE).where(GARBAGE.c.digest == digests["old"]).values(since=0)
        )
    database.close()
    store = LocalStore(tmp_path / "registry.db.store")
    until = time.monotonic() + 60
    while store.exists(digests["old"]) and time.monotonic() < until:
        time.sleep(0.01)
    assert [name for name in digests if store.exists(digests[name])] == ["new", "kept"]


def test_those_who_wait_for_a_load_that_fails_do_not_try_one_after_another(
    open_library: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = upload(open_library(), "a", adapter(tmp_path, 1))
    library = open_library()
    loads: list[str] = []

    def fail_slowly(registry: Registry, digest: str) -> bytes:
        loads.append(digest)
        until = time.monotonic() + 60
        while library._loading._locks[digest].users < 8 and time.monotonic() < until:
            time.sleep(0.001)
        raise RegistryUnavailable("away")

    with monkeypatch.context() as patch, ThreadPoolExecutor(8) as pool:
        patch.setattr(Registry, "read", fail_slowly)
        staged = [pool.submit(library.stage, info) for _ in range(8)]
        for future in staged:
            with pytest.raises(RegistryUnavailable, match="away"):
                future.result(timeout=60)
    assert loads == [info.digest]
    library.unstage(library.stage(info))


def test_a_failed_load_is_tried_again(open_library: Open, tmp_path: Path) -> None:
    info = upload(open_library(), "a", adapter(tmp_path, 1))
    library = open_library()
    [path] = [p for p in (tmp_path / "registry.db.store/records").rglob("*") if p.is_file()]
    hidden = path.rename(tmp_path / "hidden")
    for _ in range(2):
        with pytest.raises(RecordDamaged, match="is missing"):
            library.stage(info)
    hidden.rename(path)
    library.unstage(library.stage(info))


def test_staged_adapters_are_pinned_until_the_last_unstage(
    open_library: Open, tmp_path: Path
) -> None:
    library = open_library()
    first = upload(library, "a", adapter(tmp_path, 1))
    small = HostTier(first.packed_elements * 4)  # room for one
    library = open_library(host=small)
    specs = [library.stage(first), library.stage(first)]
    for spec in specs:
        with pytest.raises(AdapterTooLarge):
            upload(library, "b", adapter(tmp_path, 2))
        assert names(library) == ["a"], "what is refused changes nothing"
        library.unstage(spec)
    assert upload(library, "b", adapter(tmp_path, 2)).version == 1
    small.check()


def test_a_replaced_or_deleted_version_can_still_be_staged(
    open_library: Open, tmp_path: Path
) -> None:
    library = open_library()
    old = upload(library, "a", adapter(tmp_path, 1))
    spec = library.stage(old)
    new = upload(library, "a", adapter(tmp_path, 2))
    assert (new.version, library.resolve("a").digest) == (2, new.digest)
    assert library.resolve("a@1").digest == old.digest
    library.delete("a")
    library.unstage(spec)
    # Resolved before, staged after, by a process that has nothing in memory.
    other = open_library()
    assert other.stage(old) == spec
    other.unstage(spec)


def test_rolling_back_and_forward(open_library: Open, tmp_path: Path) -> None:
    library = open_library()
    for seed in (1, 2, 3):
        upload(library, "a", adapter(tmp_path, seed))
    assert library.activate("a", 1).active
    assert [(i.version, i.active) for i in library.versions("a")] == [
        (1, True),
        (2, False),
        (3, False),
    ]
    assert upload(library, "a", adapter(tmp_path, 2)).version == 2
    assert library.resolve("a").version == 2


@pytest.mark.parametrize("fault", ["name", "reserved", "format", "size", "basis", "host"])
def test_what_is_refused_changes_nothing(open_library: Open, tmp_path: Path, fault: str) -> None:
    directory = shutil.copytree(adapter(tmp_path, 1), tmp_path / "upload")
    change: dict[str, object] = {}
    name, error = "a", AdapterError
    if fault == "name":
        name, error = "A", AdapterNameInvalid
    elif fault == "reserved":
        name, error = "tiny", AdapterConflict
    elif fault == "format":
        (directory / "adapter_model.safetensors").write_bytes(b"nonsense")
        error = AdapterRejected
    elif fault == "size":
        change, error = {"max_upload_bytes": 100}, AdapterTooLarge
    elif fault == "host":
        change, error = {"host": HostTier(100)}, AdapterTooLarge

    def refuse_basis(_: Basis) -> None:
        raise AdapterTooLarge("no room for another basis")

    if fault == "basis":
        change, error = {"on_basis": refuse_basis}, AdapterTooLarge
    library = open_library(**change)
    with pytest.raises(error):
        upload(library, name, directory)
    assert (names(library), library.count()) == ([], 0)
    assert not [p for p in (tmp_path / "registry.db.store/records").rglob("*") if p.is_file()]
    with pytest.raises(AdapterNotFound):
        library.resolve("a@1")


@pytest.mark.parametrize("limits", [Limits(adapters=0), Limits(bytes=99)])
def test_what_the_owner_has_no_room_for_changes_nothing(
    open_library: Open, tmp_path: Path, limits: Limits
) -> None:
    host = HostTier(1 << 20)
    library = open_library(host=host)
    files = adapter_files(adapter(tmp_path, 1))
    with pytest.raises(AdapterQuotaExceeded):
        library.upload("a", files, owner="ann", limits=limits)
    assert (library.count(owner="ann"), len(host)) == (0, 0)
    assert not [p for p in (tmp_path / "registry.db.store/records").rglob("*") if p.is_file()]
    library.upload("a", files, owner="ann", limits=Limits(adapters=1, bytes=1 << 20))
    library.upload("a", files, owner="ann", limits=limits)  # what it has needs no room


@pytest.mark.parametrize("where", ["store", "database"])
def test_a_failure_half_way_leaves_nothing_visible(
    open_library: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    library, other = open_library(), open_library()

    def fail(*_: object) -> None:
        raise RegistryUnavailable("the disk is full")

    with monkeypatch.context() as patch:
        owner, method = {"store": (LocalStore, "put"), "database": (Database, "transact")}[where]
        patch.setattr(owner, method, fail)
        with pytest.raises(RegistryUnavailable):
            upload(library, "a", adapter(tmp_path, 1))
    assert names(library) == names(other) == []
    assert upload(library, "a", adapter(tmp_path, 1)).version == 1


@pytest.mark.parametrize(
    "small", [{"host": HostTier(1000)}, {"max_packed_bytes": 1000}], ids=["host", "bank"]
)
def test_a_vast_packed_size_is_refused_before_it_is_allocated(
    open_library: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: dict[str, object]
) -> None:
    def allocate(*_: object) -> None:
        raise AssertionError("was packed")

    monkeypatch.setattr(preparing, "pack_adapter", allocate)
    with pytest.raises(AdapterTooLarge, match="rank 4 on every module"):
        upload(open_library(**small), "a", adapter(tmp_path, 1, "lora"))


def test_a_check_says_what_an_upload_would_be_and_changes_nothing(
    open_library: Open, tmp_path: Path
) -> None:
    library = open_library()
    for family in KINDS:
        weights = library.check(adapter_files(adapter(tmp_path, 1, family)))
        assert (weights.family, weights.rank) == (family, 4)
    assert names(library) == []
    assert not [p for p in (tmp_path / "registry.db.store").rglob("*") if p.is_file()]


def test_shipped_adapters_appear_unless_a_user_decided_otherwise(
    open_library: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shipped = tmp_path / "shipped"
    for number, name in enumerate(["chef", "pirate", "poet"]):
        shutil.copytree(adapter(tmp_path, number), shipped / name)
    (shipped / "recipes").mkdir()
    (shipped / "README.md").write_text("not an adapter")
    shutil.copytree(shipped / "chef", shipped / "broken")
    (shipped / "broken" / "adapter_config.json").write_text("{")

    library = open_library(shipped=shipped)
    assert names(library) == ["chef", "pirate", "poet"]
    assert "shipped adapter left out" in caplog.text
    library.unstage(library.stage(library.resolve("chef@1")))

    library.delete("chef")
    mine = upload(library, "pirate", adapter(tmp_path, 9, "lora"))
    shutil.rmtree(shipped / "poet")
    shutil.copytree(adapter(tmp_path, 7), shipped / "poet")
    again = open_library(shipped=shipped)
    assert names(again) == ["pirate", "poet"], "a deleted one stays deleted"
    assert again.resolve("pirate").digest == mine.digest, "a replaced one stays replaced"
    assert again.resolve("poet").version == 2, "an untouched one follows the release"
    assert names(open_library(shipped=None)) == ["pirate", "poet"]


def test_another_base_sees_none_of_these(open_library: Open, tmp_path: Path) -> None:
    upload(open_library(), "a", adapter(tmp_path, 1, "lora"))
    other = open_library(shape=replace(SHAPE, digest="c" * 64))
    assert (names(other), other.count()) == ([], 0)
    with pytest.raises(AdapterConflict, match="another base"):
        upload_official(other, "a", tmp_path)
    # Refused before its basis was kept, of which there may be few.
    assert not list(places(f"sqlite:///{tmp_path}/registry.db").bases.iterdir())
    assert upload(other, "b", adapter(tmp_path, 2, "lora")).version == 1


@pytest.mark.parametrize("seed", range(3))
def test_two_libraries_and_four_threads_keep_the_rules(
    open_library: Open, tmp_path: Path, seed: int
) -> None:
    """Random uploads, stages, roll-backs and deletes; every pin is given back, nothing is lost."""
    directories = [adapter(tmp_path, n, family) for n in range(3) for family in KINDS]
    host = HostTier(4_000 * 4)  # a few at a time: loads and evictions all along
    libraries = [open_library(host=host), open_library(host=HostTier(1 << 20))]

    def work(number: int) -> None:
        rng = random.Random(100 * seed + number)
        library = libraries[number % 2]
        for _ in range(25):
            name = rng.choice("abc")
            action = rng.choice(["upload", "upload", "stage", "stage", "stage", "roll", "delete"])
            try:
                if action == "upload":
                    info = upload(library, name, rng.choice(directories))
                    assert info.active
                elif action == "stage":
                    info = library.resolve(name)
                    spec = library.stage(info)
                    assert spec.digest == info.digest
                    library.unstage(spec)
                elif action == "roll":
                    library.activate(name, rng.choice(library.versions(name)).version)
                else:
                    library.delete(name)
            except (AdapterNotFound, AdapterTooLarge):
                pass  # somebody else deleted it, or everything is pinned at this moment

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(work, number) for number in range(4)]:
            future.result()
    host.check()
    assert host.pinned_bytes == 0
    libraries[0]._registry.check()
    assert libraries[0].list(limit=9) == libraries[1].list(limit=9)
    for info in libraries[0].list(limit=9)[0]:
        libraries[1].unstage(libraries[1].stage(info))


# ------------------------------------------------------------------------------ a failing store


def record_file(tmp_path: Path) -> Path:
    [path] = [p for p in (tmp_path / "registry.db.store/records").rglob("*") if p.is_file()]
    return path


def serves(library: AdapterLibrary, name: str) -> bool:
    spec = library.stage(library.resolve(name))
    library.unstage(spec)
    return True


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT])
def test_a_store_that_cannot_be_written_refuses_uploads_and_serves_on(
    open_library: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    upload(open_library(), "cold", adapter(tmp_path, 1))
    library = open_library()
    upload(library, "resident", adapter(tmp_path, 2))
    mkstemp = tempfile.mkstemp

    def failing(*args: Any, **kwargs: Any) -> tuple[int, str]:
        if "registry.db.store" in str(kwargs.get("dir")):
            raise OSError(code, os.strerror(code))
        return mkstemp(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "mkstemp", failing)
        for name in ("new", "resident"):
            with pytest.raises(RegistryUnavailable, match=os.strerror(code)):
                upload(library, name, adapter(tmp_path, 3))
        assert names(library) == ["cold", "resident"]
        assert library.resolve("resident").version == 1
        assert serves(library, "resident")
        assert serves(library, "cold")  # reading still works
        assert serves(open_library(), "cold")  # and so does a restart
        # What the store has already needs no room.
        assert upload(library, "resident", adapter(tmp_path, 2)).version == 1
    assert upload(library, "new", adapter(tmp_path, 3)).version == 1


@pytest.mark.parametrize("harm", ["missing", "cut off", "other bytes"])
def test_a_lost_record_fails_its_own_adapter_until_it_is_uploaded_again(
    open_library: Open, tmp_path: Path, harm: str
) -> None:
    library = open_library()
    info = upload(library, "a", adapter(tmp_path, 1))
    path = record_file(tmp_path)
    data = path.read_bytes()
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-1] if harm == "cut off" else data[:-1] + b"?")
    assert serves(library, "a")  # resident: the store is not asked
    restarted = open_library()
    with pytest.raises(RecordDamaged, match=info.digest):
        restarted.stage(restarted.resolve("a"))
    upload(restarted, "b", adapter(tmp_path, 2))
    assert serves(restarted, "b")
    assert upload(restarted, "a", adapter(tmp_path, 1)).version == 1
    assert path.read_bytes() == data
    assert serves(open_library(), "a")


def test_what_is_resident_is_served_without_the_store(
    open_library: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = open_library()
    upload(library, "a", adapter(tmp_path, 1))

    def no_store(*_: object) -> None:
        raise AssertionError("the store was asked")

    monkeypatch.setattr(LocalStore, "get", no_store)
    assert serves(library, "a")


def test_records_of_before_the_compact_form_are_served_and_keep_their_digest(
    open_library: Open, tmp_path: Path
) -> None:
    info = upload(open_library(), "a", adapter(tmp_path, 1))
    path = record_file(tmp_path)
    plain = stored.decode(info.digest, path.read_bytes(), "")
    assert len(plain) == info.bytes > path.stat().st_size
    path.write_bytes(plain)
    library = open_library()
    assert serves(library, "a")
    assert upload(library, "a", adapter(tmp_path, 1)).version == 1
    assert path.read_bytes() == plain  # intact as it is


@pytest.mark.parametrize("family", KINDS)
def test_an_imported_adapter_is_served_bit_for_bit_also_by_a_running_library(
    open_library: Open, tmp_path: Path, family: Family
) -> None:
    before, after = HostTier(1 << 20), HostTier(1 << 20)
    info = upload(open_library(host=before), "a", adapter(tmp_path, 1, family))
    here, there = f"sqlite:///{tmp_path}/registry.db", f"sqlite:///{tmp_path}/other.db"
    running = open_library(registry_url=there, bases=BasisStore(places(there).bases), host=after)
    assert names(running) == []
    tar = io.BytesIO()
    for url, move in ((here, export_archive), (there, import_archive)):
        database, where = Database(url), places(url)
        move(database, open_store(where.store_url), where.bases, tar)
        database.close()
        tar.seek(0)
    assert running.resolve("a") == info
    spec = running.stage(running.resolve("a"))
    assert torch.equal(before.get(info.digest).data, after.get(info.digest).data)
    running.unstage(spec)


def test_archives_that_unpack_to_much_are_refused_and_unpacked_by_nobody(
    open_library: Open, tmp_path: Path
) -> None:
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("adapter_model.safetensors", bytes(1 << 24))
    library = open_library()
    whole = adapter(tmp_path, 1)
    for data in (bomb.getvalue(), gzip.compress(bytes(1 << 24)), b"\xff" * 8 + b"{}"):
        for damaged in ("adapter_config.json", "adapter_model.safetensors"):
            files = adapter_files(whole) | {damaged: tmp_path / "bomb"}
            files[damaged].write_bytes(data)
            tracemalloc.start()
            try:
                with pytest.raises(AdapterRejected):
                    library.upload("a", files)
                assert tracemalloc.get_traced_memory()[1] < 1 << 22
            finally:
                tracemalloc.stop()
    assert names(library) == []
