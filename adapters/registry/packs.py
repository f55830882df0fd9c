"""Packs: many records in one file that is written once, with one fsync.

For bulk import: a million files of 14 KB cost a million fsyncs and directory entries. A pack is
wholly there or absent (renamed into place, or one object), never changes, and is read at random
with one read for each record. It works the same on a folder and on an object store.

::

    b"shoalpk1" · frames · index · trailer
    frame    sha256 of the record (32) · length (u64) · stored bytes (``stored.py``)
    index    keys (u64 each, sorted) · offsets of frames (u64) · lengths (u32)
    trailer  number of frames (u64) · offset of the index (u64) · sha256 of the index (32) · magic

A key is the first eight bytes of the digest; the frame tells digests apart that share them.
Integers are little-endian. The indexes of all packs are held in memory: 20 bytes for each record.
A look-up bisects each pack's keys, about a microsecond a pack.
"""

import hashlib
import logging
import struct
import sys
import threading
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from shoal.adapters.registry import stored
from shoal.adapters.registry.errors import RecordDamaged, RegistryUnavailable

MAGIC = b"shoalpk1"
SUFFIX = ".pack"
PACK_BYTES_MAX = 1 << 30
RECORDS_MAX = 1 << 17
# What one read of the end of a pack asks for: the trailer, and the index of some 13,000 records.
TAIL_BYTES = 1 << 18

_FRAME = struct.Struct("<32sQ")
FRAME_BYTES = _FRAME.size  # before the stored bytes of each record
_TRAILER = struct.Struct("<QQ32s8s")
_INDEX_BYTES = 20
_READERS = 16

log = logging.getLogger(__name__)

# Reads bytes [start, end) of a pack; a negative start counts from its end, as in a slice. Raises
# FileNotFoundError when there is no such pack.
ReadRange = Callable[[str, int, int | None], bytes]
ListPacks = Callable[[], Sequence[str]]


class PackTorn(Exception):
    """A pack has no readable index: it was cut off, or changed."""


@dataclass(frozen=True, slots=True)
class Index:
    """Where the records of one pack lie: three columns, sorted by key."""

    keys: "array[int]"
    offsets: "array[int]"
    lengths: "array[int]"

    def find(self, digest: bytes) -> list[tuple[int, int]]:
        """``(start, end)`` of the frames that may be of ``digest``; hardly ever more than one."""
        key = _key(digest)
        at = bisect_left(self.keys, key)
        found = []
        while at < len(self.keys) and self.keys[at] == key:
            start = self.offsets[at]
            found.append((start, start + _FRAME.size + self.lengths[at]))
            at += 1
        return found


def pack_chunks(records: Iterable[tuple[str, bytes]]) -> Iterator[bytes]:
    """The bytes of a pack.

    Args:
        records: digest (hex) and stored bytes. A digest may be given twice.

    Raises:
        ValueError: beyond ``RECORDS_MAX`` or ``PACK_BYTES_MAX``.
    """
    found: list[tuple[int, int, int]] = []
    yield MAGIC
    offset = len(MAGIC)
    for digest, payload in records:
        name = bytes.fromhex(digest)
        found.append((_key(name), offset, len(payload)))
        offset += _FRAME.size + len(payload)
        if len(found) > RECORDS_MAX or offset > PACK_BYTES_MAX:
            raise ValueError(f"a pack holds {RECORDS_MAX} records and {PACK_BYTES_MAX} bytes")
        yield _FRAME.pack(name, len(payload))
        yield payload
    found.sort()
    columns = (
        array("Q", (key for key, _, _ in found)),
        array("Q", (start for _, start, _ in found)),
        array("I", (length for _, _, length in found)),
    )
    index = b"".join(_little(column).tobytes() for column in columns)
    yield index
    yield _TRAILER.pack(len(found), offset, hashlib.sha256(index).digest(), MAGIC)


def read_index(name: str, read: ReadRange) -> Index:
    """The index of a pack: one read, or two for a large one.

    Raises:
        PackTorn: it has none.
    """
    tail = read(name, -TAIL_BYTES, None)
    if len(tail) < _TRAILER.size:
        raise PackTorn(f"pack {name} is {len(tail)} bytes long")
    count, begin, digest, magic = _TRAILER.unpack(tail[-_TRAILER.size :])
    size = count * _INDEX_BYTES
    if magic != MAGIC or count > RECORDS_MAX or begin > PACK_BYTES_MAX:
        raise PackTorn(f"pack {name} does not end in a trailer")
    if size + _TRAILER.size > len(tail):
        tail = read(name, begin, None)
    raw = tail[-_TRAILER.size - size : -_TRAILER.size]
    if hashlib.sha256(raw).digest() != digest:
        raise PackTorn(f"the index of pack {name} is damaged")
    columns = array("Q"), array("Q"), array("I")
    for column, first, last in zip(columns, (0, 8, 16), (8, 16, 20), strict=True):
        column.frombytes(raw[count * first : count * last])
    return Index(*map(_little, columns))


def frame_payload(frame: bytes, digest: str) -> bytes | None:
    """The stored bytes of a frame; None when it is not one of ``digest``."""
    if len(frame) < _FRAME.size:
        return None
    name, length = _FRAME.unpack_from(frame)
    if name != bytes.fromhex(digest) or length != len(frame) - _FRAME.size:
        return None
    return frame[_FRAME.size :]


def frames(name: str, read: ReadRange) -> Iterator[tuple[str, bytes]]:
    """Digest and stored bytes of each frame, from the start to where the frames end or break off.

    For packs without an index too. Nothing is verified; what lies beyond damage is not found.
    """
    offset = len(MAGIC)
    while True:
        head = read(name, offset, offset + _FRAME.size)
        if len(head) < _FRAME.size:
            return
        digest, length = _FRAME.unpack(head)
        if length > PACK_BYTES_MAX:
            return
        offset += _FRAME.size
        payload = read(name, offset, offset + length)
        if len(payload) < length:
            return
        offset += length
        yield digest.hex(), payload


class Packs:
    """The packs of one store, and which of them hold a digest; thread-safe.

    New packs of other processes are seen when a digest is not found in those that are known.
    """

    def __init__(self, names: ListPacks, read: ReadRange) -> None:
        self._names = names
        self._read = read
        self._lock = threading.Lock()
        self._indexes: dict[str, Index] = {}
        self._torn: set[str] = set()
        self._listed = False

    def payloads(self, digest: str) -> Iterator[tuple[str, bytes]]:
        """Pack and stored bytes of ``digest``, from every pack that has it."""
        for name, start, end in self._find(digest):
            try:
                frame = self._read(name, start, end)
            except FileNotFoundError:
                self.forget(name)  # rewritten as another pack, which was listed or will be
                continue
            payload = frame_payload(frame, digest)
            if payload is not None:
                yield name, payload

    def holds(self, digest: str) -> bool:
        """Whether a pack seems to have ``digest``: nothing is read from it."""
        return next(self._find(digest), None) is not None

    def indexes(self) -> dict[str, Index]:
        """Every readable pack, listed anew."""
        self.refresh()
        with self._lock:
            return dict(self._indexes)

    def torn(self) -> list[str]:
        """Packs without a readable index, as of the last listing."""
        with self._lock:
            return sorted(self._torn)

    def refresh(self) -> None:
        """List the packs and read the indexes of new ones."""
        names = set(self._names())
        with self._lock:
            for gone in (self._indexes.keys() | self._torn) - names:
                self._indexes.pop(gone, None)
                self._torn.discard(gone)
            new = names - self._indexes.keys() - self._torn
        if len(new) <= 2:
            for name in new:
                self._load(name)
        else:
            # Side by side: over a network most of it is waiting.
            with ThreadPoolExecutor(_READERS) as pool:
                list(pool.map(self._load, new))
        self._listed = True

    def forget(self, name: str) -> None:
        """Read this pack's index again at the next listing, if it is still there."""
        with self._lock:
            self._indexes.pop(name, None)
            self._torn.discard(name)

    def read(self, name: str, start: int, end: int | None) -> bytes:
        """Bytes of a pack; see ``ReadRange``."""
        return self._read(name, start, end)

    def _load(self, name: str) -> None:
        try:
            index = read_index(name, self._read)
        except FileNotFoundError:
            return
        except PackTorn as problem:
            log.warning("%s: run `shoal doctor --repair`", problem)
            with self._lock:
                self._torn.add(name)
            return
        with self._lock:
            self._indexes[name] = index

    def _find(self, digest: str) -> Iterator[tuple[str, int, int]]:
        name = bytes.fromhex(digest)
        tried: set[tuple[str, int]] = set()
        for again in (False, True):
            if again or not self._listed:
                self.refresh()
            with self._lock:
                known = list(self._indexes.items())
            for pack, index in known:
                for start, end in index.find(name):
                    if (pack, start) not in tried:
                        tried.add((pack, start))
                        yield pack, start, end


def pack_name(encoded: Sequence[tuple[str, bytes]]) -> str:
    """File name of a pack. It fixes what lies where in it, so that packing again is the same."""
    text = "".join(f"{digest} {len(data)}\n" for digest, data in encoded)
    return hashlib.sha256(text.encode()).hexdigest()[:32] + SUFFIX


def read_packed(packs: Packs, digest: str, where: str, form: stored.Form) -> bytes:
    """A form of the record of ``digest``, from the first pack that has it intact.

    Raises:
        RecordDamaged: none has it.
    """
    problem = stored.missing(digest, where)
    for name, payload in packs.payloads(digest):
        try:
            return form(digest, payload, name)
        except RecordDamaged as error:
            problem = error
    raise problem


def _key(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "little")


def _little(column: "array[int]") -> "array[int]":
    """``column`` in the file's byte order, or back."""
    if column.itemsize not in (4, 8):
        raise RegistryUnavailable("packs need a platform whose C int has four bytes")
    if sys.byteorder == "big":
        column.byteswap()
    return column
