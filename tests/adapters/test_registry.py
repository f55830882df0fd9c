"""Catalog and store together: durable, consistent, and shared between threads and processes."""

import hashlib
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shoal.adapters.errors import AdapterConflict, AdapterNameInvalid, AdapterNotFound
from shoal.adapters.registry.catalog import AdapterInfo, Content
from shoal.adapters.registry.errors import RegistryUnavailable
from shoal.adapters.registry.registry import Registry

BASE = "b" * 64


def publish(registry: Registry, name: str, data: bytes) -> AdapterInfo:
    digest = hashlib.sha256(data).hexdigest()
    content = Content(digest, "core", "lora_xs", 8, len(data), 13_440, None)
    return registry.publish(name, content, data)


def open_registry(folder: Path, url: str | None = None) -> Registry:
    """The registry of a folder, which may have its names elsewhere."""
    return Registry.open(
        url or f"sqlite:///{folder}/registry.db",
        f"{folder}/store",
        base_digest=BASE,
        reserved_names=frozenset({"base"}),
    )


@pytest.fixture
def registry(tmp_path: Path, database_url: str) -> Iterator[Registry]:
    registry = open_registry(tmp_path, database_url)
    yield registry
    registry.check()
    registry.close()


def test_a_model_name_is_a_name_or_a_name_and_a_version(registry: Registry) -> None:
    publish(registry, "a.b", b"1")
    publish(registry, "a.b", b"2")
    assert registry.resolve("a.b").version == 2
    assert registry.resolve("a.b@1").version == 1
    assert registry.resolve("a.b@2").active


@pytest.mark.parametrize(
    "model",
    [
        "",
        "a",
        "a@1",
        "A.b",
        "a.b@",
        "a.b@0",
        "a.b@01",
        "a.b@+1",
        "a.b@1 ",
        "a.b@3",
        "a.b@-1",
        "@",
        "a.b@1@1",
        "a.b@v1",
        "a.b@²",
        "a.b@" + "9" * 30,
        "@1",
        "\ud800",
        "a.b\x00",
        "a" * 10_000,
    ],
)
def test_everything_else_is_not_found(registry: Registry, model: str) -> None:
    publish(registry, "a.b", b"1")
    with pytest.raises(AdapterNotFound, match="does not exist") as caught:
        registry.resolve(model)
    assert len(str(caught.value)) < 300
    if "@" not in model:
        for call in (registry.versions, registry.delete, lambda n: registry.activate(n, 1)):
            with pytest.raises(AdapterNotFound):
                call(model)


def test_refused_names_change_nothing(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(AdapterConflict, match="'base' is reserved"):
        publish(registry, "base", b"1")
    with pytest.raises(AdapterNameInvalid):
        publish(registry, "Base", b"1")
    assert registry.count() == 0
    assert not [path for path in (tmp_path / "store").rglob("*") if path.is_file()]


def test_an_old_version_stays_readable_after_replacing_and_deleting(registry: Registry) -> None:
    first = publish(registry, "a", b"1")
    publish(registry, "a", b"2")
    assert registry.read(first.digest) == b"1"
    registry.delete("a")
    assert registry.read(first.digest) == b"1"


def test_two_registries_on_one_database_see_each_others_writes(
    tmp_path: Path, database_url: str
) -> None:
    one, two = (open_registry(tmp_path, database_url) for _ in range(2))
    rng = random.Random(0)
    for step in range(40):
        writer, reader = rng.sample([one, two], 2)
        name = rng.choice("abc")
        if rng.random() < 0.2 and name in [i.name for i in writer.page(limit=9)[0]]:
            writer.delete(name)
            with pytest.raises(AdapterNotFound):
                reader.resolve(name)
        else:
            info = publish(writer, name, b"%d" % rng.randrange(4))
            assert reader.resolve(name) == info, step
            assert reader.read(info.digest) == writer.read(info.digest)
        assert one.page(limit=9) == two.page(limit=9)
    one.check()
    one.close()
    two.close()


def test_sixteen_threads_get_sixteen_consecutive_versions(registry: Registry) -> None:
    start = threading.Barrier(16)

    def upload(number: int) -> int:
        start.wait()
        return publish(registry, "a", b"%d" % number).version

    with ThreadPoolExecutor(16) as pool:
        versions = list(pool.map(upload, range(16)))
    assert sorted(versions) == list(range(1, 17))
    assert [info.version for info in registry.versions("a")] == list(range(1, 17))


def test_the_same_content_from_many_threads_is_one_version(registry: Registry) -> None:
    with ThreadPoolExecutor(8) as pool:
        infos = list(pool.map(lambda _: publish(registry, "a", b"same"), range(24)))
    assert {info.version for info in infos} == {1}


def test_readers_never_miss_a_name_while_it_moves(registry: Registry) -> None:
    publish(registry, "a", b"0")
    done = threading.Event()

    def read() -> int:
        last = 0
        while not done.is_set():
            info = registry.resolve("a")
            assert registry.read(info.digest) == b"%d" % (info.version - 1)
            assert info.version >= last
            last = info.version
        return last

    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(read) for _ in range(4)]
        for number in range(1, 25):
            publish(registry, "a", b"%d" % number)
        done.set()
        assert all(reader.result() <= 25 for reader in readers)


def test_a_locked_database_is_typed_and_nothing_becomes_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.adapters.registry.database.BUSY_TIMEOUT_S", 0.05)
    one, two = open_registry(tmp_path), open_registry(tmp_path)
    with one._database.write(), pytest.raises(RegistryUnavailable, match="locked"):
        publish(two, "a", b"1")
    assert two.count() == 0
    assert publish(two, "a", b"1").version == 1
    one.close()
    two.close()


def test_a_registry_in_memory_serves_many_threads() -> None:
    registry = Registry.open("sqlite://", base_digest=BASE)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: publish(registry, f"a{n % 5}", b"%d" % n), range(40)))
    assert registry.count() == 5
    registry.check()
    registry.close()


# ------------------------------------------------------------------------------ kill -9

# Uploads for ever and says what has been acknowledged, until somebody kills it. With step numbers
# it instead forks one writer for each, which kills itself before that call of those that change
# something, so that every point of an upload is hit.
WRITER = textwrap.dedent(
    """
    import hashlib, itertools, os, signal, sys
    from shoal.adapters.registry import lookup, placing
    from shoal.adapters.registry.catalog import Catalog, Content
    from shoal.adapters.registry.registry import Registry

    def upload_for_ever(folder, url, seed):
        url = url or f"sqlite:///{folder}/registry.db"
        registry = Registry.open(url, f"{folder}/store", base_digest="b" * 64)
        for number in itertools.count():
            data = f"{seed} {number} ".encode() * 3000
            digest = hashlib.sha256(data).hexdigest()
            content = Content(digest, "core", "lora_xs", 8, len(data), 13440, None)
            info = registry.publish(f"a{number % 3}", content, data)
            sys.stdout.write(f"{folder} {info.name} {info.version} {info.digest}\\n")
            sys.stdout.flush()

    def die_before(step):
        calls = itertools.count(1)
        def deadly(function):
            def wrapped(*args, **kwargs):
                if next(calls) == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)
            return wrapped
        for owner, name in [(os, "open"), (os, "fsync"), (os, "replace"), (os, "mkdir"),
                            (Catalog, "publish"), (placing, "place"), (lookup, "info")]:
            setattr(owner, name, deadly(getattr(owner, name)))

    folder, url, seed, *steps = sys.argv[1:]
    for step in steps:
        pid = os.fork()
        if pid == 0:
            die_before(int(step))
            upload_for_ever(f"{folder}/{step}", url, seed)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    if not steps:
        upload_for_ever(folder, url, seed)
    """
)


def start_writer(folder: Path, *arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", WRITER, str(folder), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def acknowledgements(text: str) -> list[tuple[str, str, int, str]]:
    """Folder, name, version and digest of each line; one that was cut off was not received."""
    lines = [line.split() for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [(folder, name, int(version), digest) for folder, name, version, digest in lines]


def assert_whole(
    folder: Path, acknowledged: set[tuple[str, int, str]], url: str | None = None
) -> None:
    """All that was acknowledged is there, and what is there is whole."""
    registry = open_registry(folder, url)
    registry.check()
    stored = {
        (info.name, info.version, info.digest)
        for named in registry.page(limit=10)[0]
        for info in registry.versions(named.name)
    }
    for _, _, digest in stored:
        registry.read(digest)
    assert acknowledged <= stored
    publish(registry, "a0", b"still works")
    registry.close()


def test_what_was_acknowledged_survives_kill_9_at_random_moments(
    tmp_path: Path, database_url: str
) -> None:
    rng = random.Random(1)
    acknowledged: set[tuple[str, int, str]] = set()
    for seed in range(3):
        writers = [start_writer(tmp_path, database_url, 10 * seed + number) for number in range(2)]
        first = [writer.stdout.readline() for writer in writers if writer.stdout]
        time.sleep(rng.uniform(0.0, 0.15))
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
        rest = [writer.communicate(timeout=30)[0] for writer in writers]
        for text in first + rest:
            acknowledged |= {line[1:] for line in acknowledgements(text)}
        assert_whole(tmp_path, acknowledged, database_url)
    assert len(acknowledged) >= 6


def test_a_writer_killed_at_every_step_leaves_all_or_nothing(tmp_path: Path) -> None:
    # Opening takes about 7 such calls and an upload 14: this reaches into the second upload.
    steps = range(1, 32)
    for step in steps:
        (tmp_path / str(step)).mkdir()
    writer = start_writer(tmp_path, "", 0, *steps)
    output, _ = writer.communicate(timeout=60)
    assert writer.returncode == 0
    lines = acknowledgements(output)
    counts = []
    for step in steps:
        folder = tmp_path / str(step)
        acknowledged = {line[1:] for line in lines if line[0] == str(folder)}
        assert_whole(folder, acknowledged)
        counts.append(len(acknowledged))
    assert counts == sorted(counts)
    assert set(counts) == {0, 1}
