"""Packs: many records, one file, one fsync; whole or absent, verified at every read."""

import hashlib
import os
import random
import time
from pathlib import Path

import pytest
import torch

from shoal.adapters.record import record_digest, to_record
from shoal.adapters.registry import packs, stored
from shoal.adapters.registry.errors import RecordDamaged, RegistryUnavailable
from shoal.adapters.registry.packs import Index, PackTorn, frames, pack_chunks, read_index
from shoal.adapters.registry.store import LocalStore, Store, open_store
from shoal.adapters.spec import MODULES, BaseShape, Dims
from shoal.adapters.weights import AdapterWeights


def records(count: int, seed: int = 0) -> dict[str, bytes]:
    rng = random.Random(seed)
    found = {}
    for _ in range(count):
        data = rng.randbytes(rng.randrange(300))
        found[hashlib.sha256(data).hexdigest()] = data
    return found


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    url = {"local": f"{tmp_path}/s", "memory": f"memory://{tmp_path.name}-{request.node.name}"}
    return open_store(url[request.param])


def only_pack(folder: Path) -> Path:
    [path] = (folder / "packs").iterdir()
    return path


def test_every_record_of_every_pack_comes_back(store: Store) -> None:
    sets = [records(50, seed) for seed in range(4)]
    for some in sets:
        store.put_many(list(some.items()))
        for digest, data in some.items():  # at once, also with what is known of older packs
            assert store.get(digest) == data
            assert store.exists(digest)
    with pytest.raises(RecordDamaged, match="missing"):
        store.get("0" * 64)
    assert not store.exists("0" * 64)
    assert list(store.records()) == []


def test_another_process_sees_a_new_pack_at_once(tmp_path: Path) -> None:
    one, two = LocalStore(tmp_path), LocalStore(tmp_path)
    for seed in range(3):
        some = records(5, seed)
        one.put_many(list(some.items()))
        assert [two.get(digest) for digest in some] == list(some.values())


def test_a_pack_costs_one_fsync_of_its_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path)
    calls = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append(handle), fsync(handle)))
    store.put_many(list(records(1000).items()))
    assert len(calls) == 2  # the file and the folder that names it


def test_packing_the_same_again_is_the_same_pack(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for _ in range(2):
        store.put_many(list(records(20).items()))
    assert only_pack(tmp_path)


def test_digests_that_share_a_key_are_told_apart() -> None:
    some = {f"{'ab' * 8}{n:048x}": b"%d" % n for n in range(5)}
    data = b"".join(pack_chunks(some.items()))
    index = read_index("p", lambda _, start, end: data[start:end])
    assert isinstance(index, Index)
    for digest, payload in some.items():
        found = [
            packs.frame_payload(data[a:b], digest) for a, b in index.find(bytes.fromhex(digest))
        ]
        assert len(found) == 5
        assert [p for p in found if p is not None] == [payload]


def test_an_index_longer_than_the_first_read_is_read_whole() -> None:
    count = packs.TAIL_BYTES // 20 + 10
    some = [(hashlib.sha256(b"%d" % n).hexdigest(), b"") for n in range(count)]
    data = b"".join(pack_chunks(some))
    reads = []

    def read(_: str, start: int, end: int | None) -> bytes:
        reads.append(start)
        return data[start:end]

    index = read_index("p", read)
    assert len(index.keys) == count
    assert len(reads) == 2
    assert all(index.find(bytes.fromhex(digest)) for digest, _ in some[:100])


def test_more_than_a_pack_holds_is_our_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packs, "RECORDS_MAX", 2)
    with pytest.raises(ValueError, match="a pack holds 2 records"):
        list(pack_chunks(records(3).items()))


@pytest.mark.parametrize("seed", range(10))
def test_a_torn_pack_is_left_out_and_its_whole_frames_can_be_found(seed: int) -> None:
    some = records(20)
    data = b"".join(pack_chunks(some.items()))
    torn = data[: random.Random(seed).randrange(len(data))]

    def read(_: str, start: int, end: int | None) -> bytes:
        return torn[start:end]

    with pytest.raises(PackTorn):
        read_index("p", read)
    found = [pair for pair in frames("p", read) if some.get(pair[0]) == pair[1]]
    assert found == list(some.items())[: len(found)]
    payload_bytes = sum(40 + len(payload) for _, payload in found)
    if len(found) < 20:  # the next one is not whole
        assert len(torn) - 8 < payload_bytes + 40 + len(list(some.values())[len(found)])


def test_a_torn_pack_does_not_hide_the_others(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put_many(list(records(20).items()))
    path = only_pack(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    later = records(5, seed=1)
    store.put_many(list(later.items()))
    fresh = LocalStore(tmp_path)
    assert [fresh.get(digest) for digest in later] == list(later.values())
    assert fresh.packs.torn() == [path.name]
    with pytest.raises(RecordDamaged):
        fresh.get(next(iter(records(20))))


def test_damage_in_a_pack_is_noticed_and_mended_by_the_same_upload(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    some = {d: data for d, data in records(20).items() if data}
    store.put_many(list(some.items()))
    path = only_pack(tmp_path)
    whole = bytearray(path.read_bytes())
    digest, data = list(some.items())[7]
    whole[whole.index(bytes.fromhex(digest)) + 40] ^= 1
    path.write_bytes(bytes(whole))
    with pytest.raises(RecordDamaged, match=f"{digest} is damaged"):
        store.get(digest)
    store.put(digest, data)
    assert store.get(digest) == data


def test_putting_what_a_pack_has_writes_nothing_and_counts_as_new(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put_many(list(records(5).items()))
    path = only_pack(tmp_path)
    os.utime(path, (0, 0))
    store.put(*next(iter(records(5).items())))
    assert list(store.records()) == []
    assert path.stat().st_mtime > time.time() - 60


def test_a_pack_that_was_replaced_is_found_in_its_successor(tmp_path: Path) -> None:
    one, two = LocalStore(tmp_path), LocalStore(tmp_path)
    some = records(10)
    one.put_many(list(some.items()))
    old = only_pack(tmp_path).name
    assert all(two.get(digest) == data for digest, data in some.items())
    kept = dict(list(some.items())[:5])
    one.put_many(list(kept.items()))
    assert one.retire_pack(old, time.time() + 1)
    assert all(two.get(digest) == data for digest, data in kept.items())
    with pytest.raises(RecordDamaged):
        two.get(list(some)[7])


def test_a_full_disk_leaves_no_pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RegistryUnavailable, match="No space left"):
            store.put_many(list(records(5).items()))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("put_again", [False, True])
def test_what_is_put_again_is_not_retired(store: Store, put_again: bool) -> None:
    digest, data = next(iter(records(1).items()))
    store.put(digest, data)
    before = time.time() + 0.01
    time.sleep(0.02)
    if put_again:
        store.put(digest, data)
    assert store.retire_record(digest, before) != put_again
    assert store.exists(digest) == put_again
    assert not store.retire_record("0" * 64, before)


def test_the_stored_form_is_that_of_encode_wherever_it_lies(store: Store) -> None:
    shape = BaseShape("tiny", "d" * 64, 12, dict.fromkeys(MODULES, Dims(8, 8)))
    tensors = {target: (torch.full((4, 4), 0.5),) for target in shape.targets()}
    adapter = AdapterWeights("lora_xs", "core", tensors, dict.fromkeys(tensors, 1.0), "b" * 64)
    record = to_record(adapter)
    digest = record_digest(record)
    encoded = stored.encode(digest, record)
    assert len(encoded) < len(record)
    store.put_many([(digest, record)])  # as it is, as older releases did
    assert (store.get_stored(digest), store.get(digest)) == (encoded, record)
    store.put(digest, record)
    assert (store.get_stored(digest), store.get(digest)) == (encoded, record)
    stored.verify(digest, encoded, "here")
    stored.verify(digest, record, "here")
    for bad in (encoded[:-1], encoded[:-1] + b"x", record[:-1] + b"x", encoded[:9], b""):
        with pytest.raises(RecordDamaged):
            stored.verify(digest, bad, "here")
        with pytest.raises(RecordDamaged):
            stored.decode(digest, bad, "here")
