"""What is wrong between catalog and store, and what of that can be put right.

Finds records that are missing or damaged, bases that are missing, bytes that no version refers to,
files that writers which died left half-written, and packs that are torn or mostly dead. ``repair``
removes the last four: orphans and such files older than a grace period, what is unreadable of torn
packs, and the dead part of packs. It removes nothing that
the catalog refers to, or that waits there to be collected (``garbage.py``), also while the
registry is in use: what is put again meanwhile counts as new (``Store.retire_record``).

What is missing or damaged is mended by uploading, or importing, the same content again.
"""

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Table, select

from shoal.adapters.registry import stored
from shoal.adapters.registry.archive import BATCH_BYTES
from shoal.adapters.registry.database import LONG_TIMEOUT_S, Database
from shoal.adapters.registry.errors import RecordDamaged
from shoal.adapters.registry.packed import Packed
from shoal.adapters.registry.packs import frames
from shoal.adapters.registry.store import Store, files_before
from shoal.adapters.registry.tables import GARBAGE, VERSIONS

# Longer than any upload takes from its first byte to its name, and than clocks differ.
GRACE_S = 24 * 3600.0
# A pack is rewritten when less of its bytes than this is alive.
LIVE_SHARE_MIN = 0.5
EXAMPLES_MAX = 20
# Of bases that are being written: see ``formats.container.write_atomically``.
TEMPORARY = ".*.safetensors.*"
_CHUNK = 500
_PAGE = 5000

T = TypeVar("T")

# Told now and then: what is being looked at, and how many of it so far.
Progress = Callable[[str, int], None]


@dataclass(slots=True)
class Finding:
    """How many of one kind, and some of them."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, what: str) -> None:
        self.count += 1
        if len(self.examples) < EXAMPLES_MAX:
            self.examples.append(what)


@dataclass(slots=True)
class Report:
    """What was found.

    Attributes:
        records: digests that the catalog refers to.
        missing, damaged: of those. Whoever requests such an adapter gets an error.
        missing_bases: ids of shared bases that adapters are written in and that are not there, or
            are other bytes.
        orphans: records outside packs that nobody refers to, older than the grace period.
        leftovers: half-written files, older than the grace period.
        torn_packs, dead_packs: without an index; with less than ``LIVE_SHARE_MIN`` alive.
        removed_records, removed_leftovers, removed_packs, rescued: what ``repair`` did; rescued are
            the live records of removed packs.
    """

    records: int = 0
    missing: Finding = field(default_factory=Finding)
    damaged: Finding = field(default_factory=Finding)
    missing_bases: Finding = field(default_factory=Finding)
    orphans: Finding = field(default_factory=Finding)
    leftovers: Finding = field(default_factory=Finding)
    torn_packs: Finding = field(default_factory=Finding)
    dead_packs: Finding = field(default_factory=Finding)
    removed_records: int = 0
    removed_leftovers: int = 0
    removed_packs: int = 0
    rescued: int = 0

    @property
    def healthy(self) -> bool:
        """Whether every adapter can be served."""
        return not (self.missing.count or self.damaged.count or self.missing_bases.count)


def examine(
    database: Database,
    store: Store,
    bases: Path,
    *,
    repair: bool = False,
    read_all: bool = True,
    grace_s: float = GRACE_S,
    now: float | None = None,
    progress: Progress = lambda what, done: None,
) -> Report:
    """Compare the catalog with the store, in 50 bytes of memory a packed record.

    Args:
        bases: folder of the shared bases.
        repair: remove what can be; see the module.
        read_all: read and verify every record; else only look whether it is there.
        grace_s: what is younger is spared, because bytes exist before their name does.
        now: unix time.

    Raises:
        RegistryUnavailable: the database or store failed; what was removed until then is gone.
    """
    report = Report()
    before = (time.time() if now is None else now) - grace_s
    # Torn packs first: what can be rescued of them is not missing.
    _torn_packs(database, store, report, repair)
    packed = Packed(store.packs.indexes())
    if read_all:
        packed.verify(store.packs, lambda done: progress("packed", done))
    hidden = _files(database, store, packed, report, before, repair, read_all, progress)
    holds = packed.holds_intact if read_all else packed.holds
    for page in _digests(database, VERSIONS):
        report.records += len(page)
        progress("records", report.records)
        packed.want(page)
        for digest, found in zip(page, holds(page), strict=True):
            if not found or digest in hidden:
                _check(store, digest, read_all, report)
    for page in _digests(database, GARBAGE):
        packed.want(page)
    _dead_packs(database, store, packed, report, before, repair)
    _bases(database, bases, report)
    _leftovers(store, bases, report, before, repair)
    return report


def _files(
    database: Database,
    store: Store,
    packed: Packed,
    report: Report,
    before: float,
    repair: bool,
    read_all: bool,
    progress: Progress,
) -> set[str]:
    """Records outside packs: orphans, and those that are damaged and read before a packed copy."""
    hidden: set[str] = set()
    done = 0
    for some in _chunks(store.records()):
        done += len(some)
        progress("files", done)
        if read_all:
            for (digest, _), twice in zip(some, packed.holds([d for d, _ in some]), strict=True):
                if twice:
                    try:
                        store.get(digest)
                    except RecordDamaged:
                        hidden.add(digest)
        old = [digest for digest, written in some if written < before]
        for digest in set(old) - _wanted(database, old):
            report.orphans.add(digest)
            if repair:
                report.removed_records += store.retire_record(digest, before)
    return hidden


def _check(store: Store, digest: str, read_all: bool, report: Report) -> None:
    if not store.exists(digest):
        report.missing.add(digest)
    elif read_all:
        try:
            store.get(digest)
        except RecordDamaged:
            report.damaged.add(digest)


def _bases(database: Database, bases: Path, report: Report) -> None:
    # Of `spectral` adapters it names singular vectors, which a server computes from its base.
    query = select(VERSIONS.c.basis_id).where(VERSIONS.c.family == "core").distinct()
    with database.read(limit_s=LONG_TIMEOUT_S) as connection:
        ids = sorted(basis_id for basis_id in connection.execute(query).scalars() if basis_id)
    for basis_id in ids:
        path = bases / f"{basis_id}.safetensors"
        try:
            with path.open("rb") as file:
                whole = hashlib.file_digest(file, "sha256").hexdigest() == basis_id
        except FileNotFoundError:
            whole = False
        if not whole:
            report.missing_bases.add(basis_id)


def _leftovers(store: Store, bases: Path, report: Report, before: float, repair: bool) -> None:
    for path in [*store.leftovers(before), *files_before(bases.glob(TEMPORARY), before)]:
        report.leftovers.add(str(path))
        if repair:
            # Its writer may live after all, and be done with it by now.
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
                report.removed_leftovers += 1


def _torn_packs(database: Database, store: Store, report: Report, repair: bool) -> None:
    store.packs.refresh()
    for name in store.packs.torn():
        report.torn_packs.add(name)
        if repair:
            _replace(database, store, name, report, before=float("inf"))


def _dead_packs(
    database: Database, store: Store, packed: Packed, report: Report, before: float, repair: bool
) -> None:
    for name, wanted, total in packed.bytes_wanted():
        try:
            if wanted >= total * LIVE_SHARE_MIN or store.pack_time(name) >= before:
                continue
        except FileNotFoundError:
            continue  # another doctor was here
        report.dead_packs.add(name)
        if repair:
            _replace(database, store, name, report, before)


def _replace(database: Database, store: Store, name: str, report: Report, before: float) -> None:
    """Pack what is intact and wanted of a pack anew, then remove it."""
    batch: dict[str, bytes] = {}
    size = rescued = 0
    successors: set[str] = set()

    def keep() -> None:
        nonlocal size, rescued
        if batch:
            successors.add(store.put_many(list(batch.items())))
            rescued += len(batch)
            batch.clear()
            size = 0

    for some in _chunks(frames(name, store.packs.read), 50):
        wanted = _wanted(database, (digest for digest, _ in some))
        for digest, payload in some:
            if digest not in wanted:
                continue
            try:
                stored.verify(digest, payload, name)
            except RecordDamaged:
                continue  # if there is no other copy, it is among the damaged
            batch[digest] = payload
            size += len(payload)
        if size >= BATCH_BYTES:
            keep()
    keep()
    # One of which only the index was damaged has been written anew under its own name.
    if name in successors or store.retire_pack(name, before):
        report.removed_packs += 1
        report.rescued += rescued
    store.packs.refresh()


def _digests(database: Database, table: Table) -> Iterator[Sequence[str]]:
    """Every digest of a table once, in order, by pages."""
    last = ""
    while True:
        query = select(table.c.digest).where(table.c.digest > last).distinct()
        with database.read(limit_s=LONG_TIMEOUT_S) as connection:
            page = connection.execute(query.order_by(table.c.digest).limit(_PAGE)).scalars().all()
        if not page:
            return
        yield page
        last = page[-1]


def _wanted(database: Database, digests: Iterable[str]) -> set[str]:
    """Those of ``digests`` that a version has, or that wait to be collected."""
    found: set[str] = set()
    with database.read(limit_s=LONG_TIMEOUT_S) as connection:
        for some in _chunks(digests):
            for table in (VERSIONS, GARBAGE):
                query = select(table.c.digest).where(table.c.digest.in_(some))
                found.update(connection.execute(query).scalars())
    return found


def _chunks(items: Iterable[T], size: int = _CHUNK) -> Iterator[list[T]]:
    iterator = iter(items)
    while some := list(islice(iterator, size)):
        yield some
