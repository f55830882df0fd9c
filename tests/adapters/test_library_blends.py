"""Blends in the library: composed once from the store, pinned and evicted like any adapter."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.adapters.test_library import (
    CANONICAL,
    SHAPE,
    WEIGHTS,
    Open,
    adapter,
    open_library,
    upload,
)

from shoal.adapters import library as library_module
from shoal.adapters.basis import compute_basis
from shoal.adapters.blending import Blend, blended
from shoal.adapters.composing import Base, compose
from shoal.adapters.errors import AdapterTooLarge, BlendRefused
from shoal.adapters.host_tier import HostTier
from shoal.adapters.library import COMPOSING_MAX, AdapterInfo, AdapterLibrary
from shoal.adapters.packing import PackedAdapter
from shoal.adapters.reading import adapter_files
from shoal.adapters.registry.errors import RecordDamaged
from shoal.adapters.registry.registry import Registry
from shoal.adapters.weights import Term

__all__ = ["open_library"]


def of(library: AdapterLibrary, *asked: tuple[str, float]) -> Blend[AdapterInfo]:
    """A blend of names."""
    blend = blended([(library.resolve(name), weight) for name, weight in asked])
    assert isinstance(blend, Blend)
    return blend


def filled(library: AdapterLibrary, folder: Path) -> AdapterLibrary:
    """``core``, ``fold`` and ``lora``, one of each family."""
    for seed, family in enumerate(("core", "fold", "lora"), 1):
        upload(library, family, adapter(folder, seed, family))  # type: ignore[arg-type]
    return library


ALL = (("core", 0.5), ("fold", -2.0), ("lora", 0.25))


class Composing:
    """Counts compositions; each waits until it may go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.digests: list[str] = []
        self.go_on = threading.Event()
        self.begun = threading.Semaphore(0)

        def counted(
            terms: Any, names: Any, digest: str, base: Base, **options: Any
        ) -> PackedAdapter:
            self.digests.append(digest)
            self.begun.release()
            assert self.go_on.wait(10)
            return compose(terms, names, digest, base, **options)

        monkeypatch.setattr(library_module, "compose", counted)


def test_a_blend_is_the_sum_of_what_was_uploaded(open_library: Open, tmp_path: Path) -> None:
    host = HostTier(1 << 20)
    library = filled(open_library(host=host), tmp_path)
    spec = library.stage_blend(of(library, *ALL))
    terms = [
        Term(library.check(adapter_files(adapter(tmp_path, seed, family))), weight)  # type: ignore[arg-type]
        for seed, (family, weight) in enumerate(ALL, 1)
    ]
    terms = [
        term
        for _, term in sorted(
            (library.resolve(n).digest, t) for (n, _), t in zip(ALL, terms, strict=True)
        )
    ]
    wanted = compose(
        terms,
        ["", "", ""],
        spec.digest,
        Base(SHAPE, WEIGHTS.__getitem__, lambda _: CANONICAL),
        dtype=torch.float32,
        max_bytes=1 << 20,
    )
    assert wanted.spec == spec
    assert torch.equal(host.get(spec.digest).data, wanted.data)
    library.unstage(spec)


def test_only_the_sum_is_held_while_it_runs(open_library: Open, tmp_path: Path) -> None:
    filled(open_library(), tmp_path)
    host = HostTier(1 << 20)
    library = open_library(host=host)
    blend = of(library, *ALL)
    spec = library.stage_blend(blend)
    assert len(host) == 1
    assert spec.digest == blend.digest
    assert host.pinned_bytes == host.get(spec.digest).num_bytes
    again = library.stage_blend(of(library, *reversed(ALL)))
    assert again == spec
    library.unstage(again)
    assert host.pinned_bytes > 0
    library.unstage(spec)
    assert host.pinned_bytes == 0
    host.check()


def test_a_restart_and_an_eviction_serve_the_same_bits(open_library: Open, tmp_path: Path) -> None:
    first = HostTier(1 << 20)
    library = filled(open_library(host=first), tmp_path)
    spec = library.stage_blend(of(library, *ALL))
    bits = first.get(spec.digest).data
    small = HostTier(2 * bits.numel() * bits.element_size())
    restarted = open_library(host=small)
    for _ in range(2):
        again = restarted.stage_blend(of(restarted, *reversed(ALL)))
        assert again == spec
        assert small.get(spec.digest).data.data_ptr() != bits.data_ptr()
        assert torch.equal(small.get(spec.digest).data, bits)
        restarted.unstage(again)
        for weight in (2.0, 3.0, 4.0, 5.0):  # others need its place
            restarted.unstage(restarted.stage_blend(of(restarted, ("lora", weight), ("fold", 1))))
        assert not small.pin(spec.digest)
    library.unstage(spec)


def test_what_has_arrived_is_served_whatever_happens_to_the_names(
    open_library: Open, tmp_path: Path
) -> None:
    library = filled(open_library(), tmp_path)
    blend = of(library, *ALL)
    upload(library, "core", adapter(tmp_path, 7))
    library.delete("fold")
    spec = library.stage_blend(blend)
    assert spec.digest == blend.digest
    assert of(library, ("core", 0.5), ("lora", 0.25)).digest != blend.digest
    library.unstage(spec)


def test_one_blend_is_composed_once_however_many_ask(
    open_library: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = HostTier(1 << 20)
    library = filled(open_library(host=host), tmp_path)
    composing = Composing(monkeypatch)
    blends = [of(library, *ALL), of(library, *reversed(ALL))] * 4
    with ThreadPoolExecutor(8) as pool:
        staged = [pool.submit(library.stage_blend, blend) for blend in blends]
        assert composing.begun.acquire(timeout=10)
        composing.go_on.set()
        specs = {future.result(timeout=10) for future in staged}
    assert composing.digests == [blends[0].digest]
    [spec] = specs
    for _ in blends:
        library.unstage(spec)
    assert host.pinned_bytes == 0
    assert not library._loading._locks, "a lock outlived its users"


def test_few_are_composed_at_a_time_and_what_is_resident_waits_for_none(
    open_library: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = filled(open_library(), tmp_path)
    resident = of(library, ("core", 7.0), ("lora", 1.0))
    library.unstage(library.stage_blend(resident))
    composing = Composing(monkeypatch)
    blends = [of(library, ("core", 0.1 * i), ("lora", 1.0)) for i in range(1, COMPOSING_MAX + 3)]
    with ThreadPoolExecutor(len(blends)) as pool:
        staged = [pool.submit(library.stage_blend, blend) for blend in blends]
        for _ in range(COMPOSING_MAX):
            assert composing.begun.acquire(timeout=10)
        assert not composing.begun.acquire(timeout=0.2)
        library.unstage(library.stage_blend(resident))
        library.unstage(library.stage(library.resolve("fold")))
        composing.go_on.set()
        for future in staged:
            library.unstage(future.result(timeout=10))
    assert sorted(composing.digests) == sorted(blend.digest for blend in blends)


def test_bases_are_announced_before_the_sum_is_resident(open_library: Open, tmp_path: Path) -> None:
    """One basis has a section; the other's part is multiplied out."""
    other = compute_basis(WEIGHTS.__getitem__, SHAPE, 6)
    upload(open_library(), "a", adapter(tmp_path, 1))
    upload(open_library(canonical=other), "b", adapter(tmp_path, 2, basis=other))
    host = HostTier(1 << 20)
    told: list[tuple[str, int]] = []
    library = open_library(host=host, on_basis=lambda basis: told.append((basis.id, len(host))))
    spec = library.stage_blend(of(library, ("a", 1.0), ("b", 1.0)))
    kept = min(CANONICAL.id, other.id)
    assert [(s.kind, s.basis_id) for s in spec.sections] == [("core", kept), ("lora", None)]
    assert told == [(kept, 0)]
    library.unstage(spec)


def test_uses_of_its_adapters_are_noted(
    open_library: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = filled(open_library(), tmp_path)
    noted: list[str] = []
    monkeypatch.setattr(Registry, "note_use", lambda _, info: noted.append(info.name))
    for _ in range(2):
        library.unstage(library.stage_blend(of(library, *ALL)))
    assert sorted(noted) == ["core", "core", "fold", "fold", "lora", "lora"]


# ------------------------------------------------------------------------------------ refusals


def test_no_room_beside_what_is_pinned_passes(open_library: Open, tmp_path: Path) -> None:
    filled(open_library(), tmp_path)
    lora = open_library().resolve("lora")
    host = HostTier(3 * lora.packed_elements * 4)
    library = open_library(host=host)
    held = library.stage(lora)
    first = library.stage_blend(of(library, ("lora", 2.0)))
    blend = of(library, ("lora", 3.0), ("core", 1.0))
    with pytest.raises(AdapterTooLarge, match="does not fit in the host tier"):
        library.stage_blend(blend)
    library.unstage(first)
    library.unstage(library.stage_blend(blend))
    library.unstage(held)
    assert host.pinned_bytes == 0


def test_what_could_never_run_is_refused(open_library: Open, tmp_path: Path) -> None:
    filled(open_library(), tmp_path)
    lora = open_library().resolve("lora")
    library = open_library(max_packed_bytes=lora.packed_elements * 4)
    upload(library, "second", adapter(tmp_path, 9, "lora"))
    library.unstage(library.stage_blend(of(library, ("lora", 2.0))))
    with pytest.raises(BlendRefused, match=r"lora of rank 8.*, this server has room for"):
        library.stage_blend(of(library, ("lora", 1.0), ("second", 1.0)))
    assert not library._loading._locks


def test_records_that_exceed_their_share_of_the_tier_are_not_even_read(
    open_library: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(open_library(), tmp_path)
    sizes = {name: open_library().resolve(name).bytes for name in ("core", "fold", "lora")}
    library = open_library(host=HostTier(COMPOSING_MAX * sum(sizes.values()) - 1))
    monkeypatch.setattr(Registry, "read", lambda *_: pytest.fail("read"))
    with pytest.raises(BlendRefused, match=r"take \d+ bytes together, .*'lora@1' is the largest"):
        library.stage_blend(of(library, *ALL))


def test_a_damaged_part_is_told_and_nothing_stays(open_library: Open, tmp_path: Path) -> None:
    filled(open_library(), tmp_path)
    host = HostTier(1 << 20)
    library = open_library(host=host)
    digest = library.resolve("fold").digest
    [path] = [p for p in (tmp_path / "registry.db.store/records").rglob("*") if digest in p.name]
    whole = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(RecordDamaged, match=digest):
        library.stage_blend(of(library, *ALL))
    assert (len(host), host.pinned_bytes) == (0, 0)
    path.write_bytes(whole)
    library.unstage(library.stage_blend(of(library, *ALL)))
