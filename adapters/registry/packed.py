"""All packed records of a store at once, for the doctor: who is there, intact, referred to.

Asking ``Packs`` for a million digests one by one takes minutes, because each is looked for in every
pack. Here the indexes of all packs are one sorted table, 25 bytes a record, and 8 more once they
have been read; a thousand digests are looked up in one call.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from shoal.adapters.registry import stored
from shoal.adapters.registry.errors import RecordDamaged
from shoal.adapters.registry.packs import FRAME_BYTES, Index, Packs, frame_payload

# What is read of a pack at once.
WINDOW_BYTES = 8 << 20

_Bools = npt.NDArray[np.bool_]


class Packed:
    """The records of some packs, by digest.

    A record is known by the first eight bytes of its digest (as in a pack's index), an intact one
    by sixteen: whoever finds others with the same has broken more than this.
    """

    def __init__(self, indexes: Mapping[str, Index]) -> None:
        self._indexes = dict(sorted(indexes.items()))
        columns = self._indexes.values()
        keys = _joined([np.frombuffer(each.keys, np.uint64) for each in columns], np.uint64)
        lengths = _joined([np.frombuffer(each.lengths, np.uint32) for each in columns], np.uint32)
        counts = [len(each.keys) for each in columns]
        order = np.argsort(keys)
        self._keys = keys[order]
        self._lengths = lengths[order]
        self._packs = np.repeat(np.arange(len(counts), dtype=np.uint32), counts)[order]
        self._wanted = np.zeros(len(keys), np.bool_)
        self._intact: npt.NDArray[np.uint64] | None = None

    def holds(self, digests: Sequence[str]) -> _Bools:
        """Which of ``digests`` are in a pack, whether intact or not."""
        begin, end, _ = self._find(digests)
        return end > begin

    def holds_intact(self, digests: Sequence[str]) -> _Bools:
        """Which of ``digests`` were found intact by ``verify``."""
        begin, end, second = self._find(digests)
        found = end > begin
        if self._intact is not None and len(self._keys):
            found &= self._intact[np.minimum(begin, len(self._keys) - 1)] == second
        return found

    def want(self, digests: Sequence[str]) -> None:
        """Somebody refers to these."""
        begin, end, _ = self._find(digests)
        self._wanted[begin[end > begin]] = True
        for at in np.flatnonzero(end > begin + 1):  # in several packs
            self._wanted[begin[at] : end[at]] = True

    def bytes_wanted(self) -> Iterator[tuple[str, int, int]]:
        """Name of each pack, stored bytes that somebody refers to, and of all its records."""
        count = len(self._indexes)
        total = np.bincount(self._packs, self._lengths, count)
        alive = np.bincount(self._packs, self._lengths * self._wanted, count)
        for name, of, some in zip(self._indexes, total, alive, strict=True):
            yield name, int(some), int(of)

    def verify(self, packs: Packs, progress: Callable[[int], None]) -> None:
        """Read every record, a window of a pack at a time.

        Args:
            progress: told how many were read.

        Raises:
            RegistryUnavailable: the storage failed.
        """
        self._intact = np.zeros(len(self._keys), np.uint64)
        done = 0
        for name, index in self._indexes.items():
            for start, ends in _windows(index):
                try:
                    data = packs.read(name, start, start + ends[-1])
                except FileNotFoundError:
                    break  # rewritten meanwhile: its records are looked for one by one
                good = _intact(name, data, ends)
                if good:
                    begin, _, second = self._find(good)
                    self._intact[begin] = second
                done += len(ends)
                progress(done)

    def _find(
        self, digests: Sequence[str]
    ) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.uint64]]:
        """Where each would begin and end in the table, and the second eight bytes of it."""
        words = np.frombuffer(bytes.fromhex("".join(digests)), "<u8").astype(np.uint64)
        words = words.reshape(-1, 4)
        key = words[:, 0]
        begin = np.searchsorted(self._keys, key, "left")
        return begin, np.searchsorted(self._keys, key, "right"), words[:, 1]


def _joined(parts: list[npt.NDArray[np.generic]], dtype: type) -> npt.NDArray[np.generic]:
    return np.concatenate(parts) if parts else np.empty(0, dtype)


def _windows(index: Index) -> Iterator[tuple[int, list[int]]]:
    """Frames that lie one after the other: where the first starts, and how far on each ends."""
    start, ends = 0, list[int]()
    for at, length in sorted(zip(index.offsets, index.lengths, strict=True)):
        if ends and (at != start + ends[-1] or ends[-1] >= WINDOW_BYTES):
            yield start, ends
            ends = []
        if not ends:
            start = at
        ends.append(at - start + FRAME_BYTES + length)
    if ends:
        yield start, ends


def _intact(name: str, data: bytes, ends: Sequence[int]) -> list[str]:
    """Digests of the frames in ``data`` that are what they should be."""
    found, begin = [], 0
    for end in ends:
        frame = data[begin:end]
        begin = end
        digest = frame[:32].hex()
        payload = frame_payload(frame, digest) if len(digest) == 64 else None
        if payload is not None:
            try:
                stored.verify(digest, payload, name)
            except RecordDamaged:
                continue
            found.append(digest)
    return found
