"""Bases that several hosts share through an object store."""

import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from tests.adapters.test_library import CANONICAL, SHAPE, WEIGHTS, adapter, upload

from shoal.adapters.basis import Basis, BasisStore, make_basis, save_basis
from shoal.adapters.host_tier import HostTier
from shoal.adapters.library import AdapterLibrary
from shoal.adapters.registry.database import Database
from shoal.adapters.registry.errors import RecordDamaged, RegistryUnavailable
from shoal.adapters.registry.object_store import ObjectStore
from shoal.adapters.registry.registry import Registry
from shoal.adapters.registry.retrying import Patience
from shoal.adapters.registry.shared_bases import SharedBases
from shoal.adapters.registry.store import places


def a_basis(seed: int) -> Basis:
    """One that an upload could bring."""
    generator = torch.Generator().manual_seed(seed)
    factors = {
        target: torch.linalg.qr(
            torch.randn(SHAPE.dims[target.module].d_out, 4, generator=generator)
        ).Q
        for target in SHAPE.targets()
    }
    return make_basis(factors, kind="uploaded", base_digest=SHAPE.digest)


@pytest.fixture
def store() -> ObjectStore:
    patience = Patience(attempts=2, first_wait_s=0.0, longest_wait_s=0.0)
    return ObjectStore(MemoryFileSystem(), f"/{uuid.uuid4().hex}", patience)


@pytest.fixture
def host(tmp_path: Path, store: ObjectStore) -> Callable[[str], SharedBases]:
    """``host("a")``: the shared bases as that host opens them."""

    def open_it(name: str) -> SharedBases:
        bases = SharedBases(tmp_path / name, store)
        bases.sync()
        return bases

    return open_it


def test_a_basis_that_one_host_adds_is_found_by_another_that_was_there_before(
    host: Callable[[str], SharedBases],
) -> None:
    here, there = host("a"), host("b")
    before = BasisStore(there.folder, there)
    basis = a_basis(1)
    assert BasisStore(here.folder, here).add(basis)
    assert before.get(basis.id) is None
    found = before.find(basis.id, SHAPE)
    assert found is not None
    assert found.id == basis.id
    assert all(torch.equal(found.factors[t], basis.factors[t]) for t in basis.factors)
    assert before.get(basis.id) is found
    assert before.find("0" * 64, SHAPE) is None
    later = host("c")
    assert BasisStore(later.folder, later).get(basis.id) is not None


def test_what_was_added_before_there_was_a_copy_is_sent(
    host: Callable[[str], SharedBases], tmp_path: Path
) -> None:
    basis = a_basis(1)
    BasisStore(tmp_path / "a").add(basis)
    host("a")
    other = host("b")
    assert (other.folder / f"{basis.id}.safetensors").exists()


def test_a_basis_is_not_known_before_other_hosts_can_have_it(
    host: Callable[[str], SharedBases], store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    bases = host("a")
    known = BasisStore(bases.folder, bases)
    basis = a_basis(1)

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("connection reset")

    with monkeypatch.context() as broken:
        broken.setattr(MemoryFileSystem, "put_file", fail)
        with pytest.raises(RegistryUnavailable, match="connection reset"):
            known.add(basis)
    assert known.get(basis.id) is None
    assert known.add(basis)
    assert store.files("bases") == [f"{basis.id}.safetensors"]


def test_other_bytes_in_the_store_are_refused_and_left_out(
    host: Callable[[str], SharedBases], store: ObjectStore, tmp_path: Path
) -> None:
    basis = a_basis(1)
    save_basis(a_basis(2), tmp_path / "wrong")
    store.send_file(f"bases/{basis.id}.safetensors", tmp_path / "wrong")
    bases = host("a")
    assert list(bases.folder.iterdir()) == []
    with pytest.raises(RecordDamaged, match="has sha256"):
        bases.fetch(basis.id)
    assert list(bases.folder.iterdir()) == []


@pytest.fixture
def libraries(
    tmp_path: Path, store: ObjectStore, host: Callable[[str], SharedBases]
) -> Iterator[Callable[[str], tuple[AdapterLibrary, HostTier]]]:
    """``libraries("a")``: a server on host ``a`` of one registry whose bytes are in the store."""
    opened: list[AdapterLibrary] = []

    def open_it(name: str) -> tuple[AdapterLibrary, HostTier]:
        shared, tier = host(name), HostTier(1 << 20)
        library = AdapterLibrary(
            Registry(Database(f"sqlite:///{tmp_path}/r.db"), store, base_digest=SHAPE.digest),
            shape=SHAPE,
            weight_of=WEIGHTS.__getitem__,
            canonical=CANONICAL,
            bases=BasisStore(shared.folder, shared),
            host=tier,
            on_basis=lambda basis: None,
            dtype=torch.float32,
            max_upload_bytes=1 << 20,
        )
        opened.append(library)
        return library, tier

    yield open_it
    for library in opened:
        library.close()


def test_an_adapter_uploaded_to_one_host_is_served_by_another(
    libraries: Callable[[str], tuple[AdapterLibrary, HostTier]], tmp_path: Path
) -> None:
    there, at_there = libraries("b")
    own = a_basis(3)
    (tmp_path / "a").mkdir()
    save_basis(own, tmp_path / "a" / f"{own.id}.safetensors")
    here, at_here = libraries("a")
    for name, basis in (("canonical", CANONICAL), ("own", own)):
        info = upload(here, name, adapter(tmp_path, 1, "core", basis))
        spec = there.stage(there.resolve(name))
        assert info.basis_id == basis.id
        assert torch.equal(at_here.get(info.digest).data, at_there.get(info.digest).data)
        there.unstage(spec)
    shutil.rmtree(tmp_path / "b")
    again, _ = libraries("b")
    again.unstage(again.stage(again.resolve("own")))


def test_a_database_and_an_object_store_need_no_folder_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    one = places("postgresql+psycopg://user@host/name", "memory://one")
    two = places("postgresql+psycopg://user@host/name", "memory://two")
    assert one.store_url == "memory://one"
    assert one.bases != two.bases
    assert one.bases.is_relative_to(tmp_path)
    shared = SharedBases.open(one)
    assert BasisStore(shared.folder, shared).add(a_basis(1))
    assert len(ObjectStore(MemoryFileSystem(), "/one").files("bases")) == 1
