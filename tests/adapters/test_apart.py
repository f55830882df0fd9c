"""Uploads prepared beside the server: the same bytes, the same refusals, and nothing lost."""

import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.adapters import apart
from shoal.adapters.apart import Asked, Helpers, Setup, make_setup
from shoal.adapters.apart_worker import _Known, prepare
from shoal.adapters.basis import make_basis, sketch
from shoal.adapters.errors import (
    AdapterConflict,
    AdapterNameInvalid,
    AdapterQuotaExceeded,
    AdapterRejected,
    AdapterTooLarge,
)
from shoal.adapters.formats.writing import write_compact_lora_xs
from shoal.adapters.layouts import Layouts
from shoal.adapters.packing import PackedAdapter
from shoal.adapters.preparing import Packing, Prepared
from shoal.adapters.reading import adapter_files
from shoal.adapters.registry.catalog import AdapterInfo
from shoal.adapters.registry.keys import Limits
from shoal.adapters.registry.registry import Address, Registry

HERE = ("lora", "lora_rs", "miss", "miss_mini", "bone")
REFUSED = ("lora_head", "lora_bias")
# They bring factors that are compared with the base's weights, or are made from them.
SERVERS = ("lora_dora", "xs_new_key", "xs_rank_8", "tinylora", "lora_pissa")
BYTES_MAX = 1 << 20
START_S = 120.0  # for a process to start on a busy machine


def setup_of(golden: Any, layouts: Layouts | None = None) -> Setup:
    packing = Packing(golden.shape, torch.float32, BYTES_MAX, layouts)
    registry = Address("sqlite://", "", golden.shape.digest, frozenset({"tiny"}))
    return make_setup(
        registry, packing, golden.canonical, max_bytes=BYTES_MAX, max_bases=4, spectral=False
    )


def compact(golden: Any, folder: Path, seed: int = 0) -> Path:
    rng = torch.Generator().manual_seed(seed)
    r = {target: torch.randn(4, 4, generator=rng) for target in golden.shape.targets()}
    write_compact_lora_xs(folder, r, alpha=4, rank=4, basis=golden.canonical, shape=golden.shape)
    return folder


def by_a_helper(golden: Any, folder: Path) -> Prepared:
    made = prepare(setup_of(golden), adapter_files(folder), _Known())
    assert made is not None
    return made


def by_the_server(golden: Any, folder: Path) -> Prepared:
    return setup_of(golden).packing.prepare(golden.read(folder))


def assert_same(made: Prepared, wanted: Prepared) -> None:
    assert (made.content, made.record) == (wanted.content, wanted.record)
    assert made.packed.spec == wanted.packed.spec
    assert made.packed.data.dtype == wanted.packed.data.dtype
    assert torch.equal(made.packed.data, wanted.packed.data)


@pytest.mark.parametrize("case", HERE)
def test_a_helper_makes_what_the_server_would_have_made(golden: Any, case: str) -> None:
    folder = golden.copy(case)
    assert_same(by_a_helper(golden, folder), by_the_server(golden, folder))


@pytest.mark.parametrize("case", REFUSED)
def test_a_helper_refuses_what_the_server_would_have_refused(golden: Any, case: str) -> None:
    folder = golden.copy(case)
    with pytest.raises(AdapterRejected) as refusal:
        golden.read(folder)
    with pytest.raises(AdapterRejected) as refused:
        by_a_helper(golden, folder)
    assert str(refused.value) == str(refusal.value)


def test_compact_files_are_compared_with_probes_alone(golden: Any, tmp_path: Path) -> None:
    folder = compact(golden, tmp_path / "a")
    assert_same(by_a_helper(golden, folder), by_the_server(golden, folder))
    tensors = golden.tensors(folder)
    name = next(name for name in tensors if name.endswith("basis_probe"))
    golden.save(folder, {**tensors, name: -tensors[name]})
    with pytest.raises(AdapterRejected) as refusal:
        golden.read(folder)
    with pytest.raises(AdapterRejected) as refused:
        by_a_helper(golden, folder)
    assert str(refused.value) == str(refusal.value)


def test_what_is_packed_like_the_one_before_is_the_same(golden: Any, tmp_path: Path) -> None:
    setup = setup_of(golden, Layouts(golden.shape, torch.float32))
    for seed in range(3):
        folder = compact(golden, tmp_path / str(seed), seed)
        made = prepare(setup, adapter_files(folder), _Known())
        assert made is not None
        assert_same(made, by_the_server(golden, folder))


@pytest.mark.parametrize("case", SERVERS)
def test_what_needs_the_base_is_left_to_the_server(golden: Any, case: str) -> None:
    assert prepare(setup_of(golden), adapter_files(golden.copy(case)), _Known()) is None


def test_a_compact_file_on_an_uploaded_basis(golden: Any, tmp_path: Path) -> None:
    own = make_basis(
        {t: factor[:, [1, 0]] for t, factor in golden.canonical.factors.items()},
        kind="uploaded",
        base_digest=golden.shape.digest,
    )
    golden.bases.add(own)
    known = _Known()
    r = {target: torch.eye(2) for target in own.factors}
    write_compact_lora_xs(tmp_path / "a", r, alpha=4, rank=2, basis=own, shape=golden.shape)
    files = adapter_files(tmp_path / "a")
    with pytest.raises(AdapterRejected):
        prepare(setup_of(golden), files, known)
    known.bases = (sketch(own),)
    made = prepare(setup_of(golden), files, known)
    assert made is not None
    assert made.content.basis_id == own.id
    assert_same(made, by_the_server(golden, tmp_path / "a"))


# -- processes ------------------------------------------------------------------------------------


@dataclass
class World:
    """A registry in a file, and helpers that publish to it."""

    golden: Any
    registry: Registry
    helpers: Helpers
    url: str

    def upload(self, files: dict[str, Path], name: str = "a", **how: Any) -> AdapterInfo | None:
        """What a helper made of it; ``placed`` has what it packed."""
        owner, limits = how.pop("owner", ""), how.pop("limits", None)
        self.placed: list[PackedAdapter] = []
        return self.helpers.upload(
            Asked(name=name, owner=owner, limits=limits, files=files),
            (),
            place=how.pop("place", self.placed.append),
            published=how.pop("published", self.registry.published_elsewhere(name, owner=owner)),
        )

    def uploaded(self, files: dict[str, Path], name: str = "a", **how: Any) -> AdapterInfo:
        """The same; until a process has started it is not done."""
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            info = self.upload(files, name, **how)
            if info is not None:
                return info
            time.sleep(0.05)
        raise AssertionError("no helper started")

    def names(self) -> list[str]:
        return [info.name for info in self.registry.page(limit=10)[0]]


@pytest.fixture
def world(golden: Any, tmp_path: Path) -> Iterator[World]:
    url = f"sqlite:///{tmp_path / 'registry.db'}"
    setup = setup_of(golden)
    address = replace(setup.registry, registry_url=url, store_url=str(tmp_path / "store"))
    registry = address.open()
    helpers = Helpers(lambda: replace(setup, registry=address), 1)
    yield World(golden, registry, helpers, url)
    helpers.close()
    registry.close()


def test_a_process_uploads_refuses_and_is_replaced_when_it_dies(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden, helpers = world.golden, world.helpers
    folder = compact(golden, tmp_path / "a")
    files = adapter_files(folder)
    assert world.upload(files) is None, "nobody waits for a process to start"
    wanted = by_the_server(golden, folder)
    info = world.uploaded(files)
    assert info == world.registry.resolve("a")
    assert (info.version, info.digest, info.bytes) == (1, wanted.content.digest, len(wanted.record))
    assert world.registry.read(info.digest) == wanted.record
    (packed,) = world.placed
    assert packed.spec == wanted.packed.spec
    assert torch.equal(packed.data, wanted.packed.data)

    (first,) = helpers._helpers
    bad = golden.edit_config(compact(golden, tmp_path / "bad"), r=5)
    with pytest.raises(AdapterRejected) as refusal:
        golden.read(bad)
    with pytest.raises(AdapterRejected) as refused:
        world.upload(adapter_files(bad))
    assert str(refused.value) == str(refusal.value)
    assert (refused.value.where, refused.value.rule) == (refusal.value.where, refusal.value.rule)
    with pytest.raises(AdapterNameInvalid):
        world.upload(files, "../a")
    with pytest.raises(AdapterConflict, match="reserved"):
        world.upload(files, "tiny")
    with pytest.raises(AdapterQuotaExceeded) as quota:
        world.upload(files, "b", owner="team", limits=Limits(bytes=10))
    assert (quota.value.allowed, quota.value.needed) == (10, len(wanted.record))
    assert world.names() == ["a"]

    with monkeypatch.context() as patch:
        patch.setattr(apart, "BYTES_MAX", 10)
        assert world.upload(files) is None, "large files are the server's"
    assert set(helpers._helpers) == {first}, "none of this harmed it"

    os.kill(first.pid, signal.SIGKILL)
    assert world.upload(files) is None, "what it was to do is the server's"
    assert world.uploaded(adapter_files(compact(golden, tmp_path / "b", seed=1))).version == 2
    (second,) = helpers._helpers
    assert second.pid != first.pid
    helpers.close()
    assert second._process.poll() is not None
    assert world.upload(files) is None


def test_what_cannot_be_placed_is_not_published(world: World, tmp_path: Path) -> None:
    files = adapter_files(compact(world.golden, tmp_path / "a"))
    world.uploaded(files, "first")
    (helper,) = world.helpers._helpers

    def refuse(_: PackedAdapter) -> None:
        raise AdapterTooLarge("no room")

    with pytest.raises(AdapterTooLarge, match="no room"):
        world.upload(files, "second", place=refuse)
    assert world.names() == ["first"]
    assert world.upload(files, "third") is not None
    assert set(world.helpers._helpers) == {helper}


@pytest.mark.parametrize("when", ["place", "published"])
def test_a_process_that_dies_half_way_publishes_nothing(
    world: World, tmp_path: Path, when: str
) -> None:
    files = adapter_files(compact(world.golden, tmp_path / "a"))
    world.uploaded(files, "first")

    def kill(*_: object) -> None:
        (helper,) = world.helpers._helpers
        os.kill(helper.pid, signal.SIGKILL)
        helper._process.wait()

    @contextmanager
    def killed() -> Iterator[None]:
        kill()
        yield

    how: dict[str, Any] = {"place": kill} if when == "place" else {"published": killed()}
    assert world.upload(files, "second", **how) is None
    assert world.names() == ["first"]
    assert world.uploaded(files, "second").version == 1


def test_a_process_that_says_nothing_does_not_keep_others_from_writing(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apart, "PUBLISHED_S", 0.5)
    files = adapter_files(compact(world.golden, tmp_path / "a"))
    world.uploaded(files, "first")
    (helper,) = world.helpers._helpers

    @contextmanager
    def stopped() -> Iterator[None]:
        os.kill(helper.pid, signal.SIGSTOP)
        yield

    rescue = threading.Timer(START_S, os.kill, (helper.pid, signal.SIGKILL))
    rescue.start()
    try:
        assert world.upload(files, "second", published=stopped()) is None
        assert rescue.is_alive(), "it was waited for"
    finally:
        rescue.cancel()
    assert world.names() == ["first"]
    assert world.helpers._helpers == set()
    assert world.uploaded(files, "second").version == 1


def test_a_failure_while_it_is_published_costs_the_process_not_the_next_upload(
    world: World, tmp_path: Path
) -> None:
    """It waits for a word that will not come, and must not be given the next upload."""
    files = adapter_files(compact(world.golden, tmp_path / "a"))
    world.uploaded(files, "first")

    @contextmanager
    def failing() -> Iterator[None]:
        raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt):
        world.upload(files, "second", published=failing())
    assert world.names() == ["first"]
    assert world.uploaded(files, "third").name == "third"


def test_a_process_publishes_nothing_once_its_server_is_gone(
    world: World, golden: Any, tmp_path: Path
) -> None:
    """Also when it waited for its turn to write until then."""
    files = adapter_files(compact(golden, tmp_path / "a"))
    process = subprocess.Popen(
        [sys.executable, "-m", "shoal.adapters.apart_worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    to, source = process.stdin, process.stdout
    assert to is not None
    assert source is not None

    def ask(message: object) -> Any:
        apart.send(to, message)
        return pickle.load(source)

    with to, source:
        assert ask(world.helpers._setup()) is True
        assert isinstance(ask(Asked(name="a", owner="", limits=None, files=files)), apart.Made)
        assert ask(apart.GO) is None
        database = sqlite3.connect(world.url.removeprefix("sqlite:///"), isolation_level=None)
        database.execute("BEGIN IMMEDIATE")
        apart.send(to, apart.GO)
        to.close()
        database.execute("ROLLBACK")
        database.close()
        assert process.wait(START_S) == 0
        assert source.read() == b""
    assert world.names() == []


def test_a_registry_in_memory_is_the_servers_alone() -> None:
    address = Address("sqlite://", "", "", frozenset())
    assert not address.reachable
    assert not replace(address, registry_url="sqlite+pysqlite:///:memory:").reachable
    assert replace(address, registry_url="sqlite:////data/registry.db").reachable
    assert replace(address, registry_url="postgresql+psycopg://host/name").reachable


@pytest.mark.parametrize("store", ["memory://store", "simplecache::memory://store"])
def test_a_store_in_memory_is_the_servers_alone(store: str) -> None:
    """A helper kept the record in its own memory: the name was there, its bytes were not."""
    address = Address("sqlite:////data/registry.db", store, "", frozenset())
    assert not address.reachable
    assert replace(address, store_url="s3://bucket/memory").reachable
    assert replace(address, store_url="/data/memory").reachable


def test_uploads_are_left_to_the_server_where_what_a_helper_is_told_cannot_be_made() -> None:
    asked = Asked(name="a", owner="", limits=None, files={})
    tries = []

    def setup() -> Setup:
        tries.append(1)
        raise ValueError("planted")

    helpers = Helpers(setup, 1)
    end = time.monotonic() + START_S
    while len(tries) < 1 + apart.DEATHS_MAX and time.monotonic() < end:
        assert helpers.upload(asked, (), place=pytest.fail, published=nullcontext()) is None
        time.sleep(0.001)
    assert len(tries) == 1 + apart.DEATHS_MAX, "each was tried, after the one that came first"
    helpers.close()


def test_one_that_cannot_start_is_not_tried_for_ever(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = []

    def fail(self: object, setup: Setup) -> None:
        starts.append(1)
        raise EOFError

    monkeypatch.setattr(apart._Helper, "__init__", fail)
    files = adapter_files(compact(world.golden, tmp_path / "a"))
    for _ in range(200):
        assert world.upload(files) is None
        time.sleep(0.001)
    end = time.monotonic() + START_S
    while len(starts) < apart.DEATHS_MAX and time.monotonic() < end:
        assert world.upload(files) is None
    assert len(starts) == apart.DEATHS_MAX


class Ready:
    """Stands in for a helper process; one upload at a time."""

    pid = 1
    at_rest = True
    took = 0.0

    def __init__(self, setup: object) -> None:
        self.busy = threading.Lock()
        self.uploads = 0

    def upload(self, *_: object, **__: object) -> object:
        assert self.busy.acquire(blocking=False), "two uploads at once"
        time.sleep(self.took)
        self.uploads += 1
        self.busy.release()
        return "done"

    def close(self) -> None:
        pass


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + START_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_started_ahead_all_are_there_before_the_first_upload(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(apart, "_Helper", Ready)
    setup: Any = None
    helpers = Helpers(lambda: setup, 3, ahead=True)
    wait_until(lambda: len(helpers._idle) == 3)
    wait_until(lambda: "shoal-upload-setup" not in {t.name for t in threading.enumerate()})
    assert len(helpers._helpers) == 3
    helpers.close()


def test_started_ahead_a_fault_that_passes_costs_only_the_time_until_the_first_upload(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    starts = []

    class Failing(Ready):
        def __init__(self, setup: object) -> None:
            starts.append(1)
            if len(starts) == 1:
                raise EOFError
            super().__init__(setup)

    monkeypatch.setattr(apart, "_Helper", Failing)
    setup: Any = None
    helpers = Helpers(lambda: setup, 30, ahead=True)
    wait_until(lambda: len(starts) == 1)
    wait_until(lambda: "shoal-upload-setup" not in {t.name for t in threading.enumerate()})
    assert len(starts) == 1, "not tried again at once"
    asked = Asked(name="a", owner="", limits=None, files={})

    def uploaded() -> bool:
        return helpers.upload(asked, (), place=pytest.fail, published=nullcontext()) is not None

    wait_until(uploaded)
    helpers.close()


def test_everyone_who_waits_for_a_helper_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "_Helper", Ready)
    monkeypatch.setattr(Ready, "took", 0.002)
    setup: Any = None
    helpers = Helpers(lambda: setup, 2, ahead=True)
    wait_until(lambda: len(helpers._idle) == 2)
    asked = Asked(name="a", owner="", limits=None, files={})
    answers: list[object] = []

    def work() -> None:
        for _ in range(10):
            answers.append(helpers.upload(asked, (), place=pytest.fail, published=nullcontext()))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(START_S)
    assert answers == ["done"] * 80
    assert sum(helper.uploads for helper in helpers._helpers) == 80  # type: ignore[attr-defined]
    helpers.close()


@pytest.mark.parametrize("said", [0, 20])
def test_a_process_ends_with_its_server(said: int) -> None:
    """Silently, also when it hears half a message."""
    process = subprocess.run(
        [sys.executable, "-m", "shoal.adapters.apart_worker"],
        input=pickle.dumps("x" * 1000)[:said],
        capture_output=True,
        timeout=START_S,
        check=True,
    )
    assert process.stdout == process.stderr == b""
