"""Export and import of a registry as one tar stream: bulk transfer, and backup of the adapters.

::

    shoal.json              {"format": 1, "adapters": how many there were, about}
    bases/<id>.safetensors  the shared bases
    adapters/00000000.jsonl one line an adapter: its names, versions, tags and shares
    records/00000000.pack   the records of these, as a pack (``packs.py``)
    adapters/00000001.jsonl …
    end.json                that it is whole

Memory is bounded by one batch, on both sides. An import that was stopped is run again: batches
that are in already are read past and not written, unless it is to mend what the registry has lost.
Digests are checked; that a record is one that can be served is not, because an archive comes from a
registry that checked: import what you trust.

Not in an archive: API keys, use times, and the numbers of deleted versions.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, get_args

from sqlalchemy import func, select

from shoal.adapters.errors import AdapterError, AdapterRejected
from shoal.adapters.registry import garbage, stored
from shoal.adapters.registry.bulk import (
    Adapter,
    Outcome,
    Version,
    missing,
    publish_many,
    referred,
)
from shoal.adapters.registry.catalog import Content, Source
from shoal.adapters.registry.database import LONG_TIMEOUT_S, Database
from shoal.adapters.registry.errors import RecordDamaged
from shoal.adapters.registry.names import validate_name, validate_tags
from shoal.adapters.registry.packs import frames, pack_chunks
from shoal.adapters.registry.store import Store
from shoal.adapters.registry.tables import ADAPTERS, SHARES, TOTALS, VERSIONS
from shoal.adapters.spec import Family

FORMAT = 1
BATCH_ADAPTERS = 4096
BATCH_BYTES = 64 << 20
# Larger records get a file each: nothing is gained by packing them.
PACKED_BYTES_MAX = 1 << 20
RECORD_BYTES_MAX = 1 << 30
BASE_BYTES_MAX = 8 << 30
LINES_BYTES_MAX = 256 << 20

_MEMBER = re.compile(
    r"shoal\.json|end\.json|bases/([0-9a-f]{64})\.safetensors|(adapters|records)/[0-9]{8}\.(?:jsonl|pack)"
)

# Told after each batch: adapters done so far, and how many there are or None.
Progress = Callable[[int, int | None], None]


@dataclass(slots=True)
class Exported:
    """Adapters written, and those left out because their bytes are missing or damaged."""

    adapters: int = 0
    left_out: int = 0


# --------------------------------------------------------------------------------------- export


def export_archive(
    database: Database,
    store: Store,
    bases: Path,
    out: BinaryIO,
    *,
    progress: Progress = lambda done, of: None,
) -> Exported:
    """Write every live adapter of every owner and base to ``out``, which need not seek.

    Adapters that change meanwhile are exported as they were before or after.

    Raises:
        RegistryUnavailable; OSError of ``out``.
    """
    exported = Exported()
    with database.read(limit_s=LONG_TIMEOUT_S) as connection:
        total = int(connection.execute(select(func.sum(TOTALS.c.names))).scalar() or 0)
    batches = _batches(database, store, exported)
    files = {path.stem: path for path in sorted(bases.glob("*.safetensors"))}
    exported.adapters = write_archive(out, batches, files, total=total, progress=progress)
    return exported


def write_archive(
    out: BinaryIO,
    batches: Iterable[tuple[Sequence[Adapter], Mapping[str, bytes]]],
    bases: Mapping[str, Path],
    *,
    total: int,
    progress: Progress = lambda done, of: None,
) -> int:
    """Write an archive; returns how many adapters it has.

    Args:
        out: need not seek.
        batches: adapters, and by digest the stored bytes (``stored.py``) of all their versions;
            each within ``BATCH_ADAPTERS`` and about ``BATCH_BYTES``.
        bases: files of the bases that they are written in, by their sha256.
        total: how many adapters there will be, about.
    """
    done = 0
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        _add(tar, "shoal.json", json.dumps({"format": FORMAT, "adapters": total}).encode())
        for basis_id, path in bases.items():
            with path.open("rb") as file:
                member = tarfile.TarInfo(f"bases/{basis_id}.safetensors")
                member.size = os.fstat(file.fileno()).st_size
                tar.addfile(member, file)
        for number, (adapters, records) in enumerate(batches):
            lines = "".join(json.dumps(_to_json(adapter)) + "\n" for adapter in adapters)
            _add(tar, f"adapters/{number:08}.jsonl", lines.encode())
            _add(tar, f"records/{number:08}.pack", b"".join(pack_chunks(records.items())))
            done += len(adapters)
            progress(done, total)
        _add(tar, "end.json", b"{}")
    return done


def _batches(
    database: Database, store: Store, exported: Exported
) -> Iterator[tuple[list[Adapter], dict[str, bytes]]]:
    adapters: list[Adapter] = []
    records: dict[str, bytes] = {}
    size = 0
    for adapter in _all_adapters(database):
        own: dict[str, bytes] = {}
        try:
            for version in adapter.versions:
                digest = version.content.digest
                if digest not in records:
                    own[digest] = store.get_stored(digest)
        except RecordDamaged:
            exported.left_out += 1
            continue
        adapters.append(adapter)
        records |= own
        size += sum(map(len, own.values()))
        if len(adapters) >= BATCH_ADAPTERS or len(records) >= BATCH_ADAPTERS or size >= BATCH_BYTES:
            yield adapters, records
            adapters, records, size = [], {}, 0
    if adapters:
        yield adapters, records


def _all_adapters(database: Database) -> Iterator[Adapter]:
    """Every live adapter, in the order in which their names came to be."""
    last = 0
    while True:
        live = (ADAPTERS.c.id > last, ADAPTERS.c.deleted_at.is_(None))
        page = select(ADAPTERS).where(*live).order_by(ADAPTERS.c.id).limit(500)
        with database.read(limit_s=LONG_TIMEOUT_S) as connection:
            rows = connection.execute(page).all()
            if not rows:
                return
            ids = [row.id for row in rows]
            versions: dict[int, list[Version]] = {}
            query = select(VERSIONS).where(VERSIONS.c.adapter_id.in_(ids))
            for row in connection.execute(query.order_by(VERSIONS.c.version)):
                content = Content(
                    digest=row.digest,
                    family=row.family,
                    format=row.format,
                    rank=row.rank,
                    bytes=row.bytes,
                    packed_elements=row.packed_elements,
                    basis_id=row.basis_id,
                )
                version = Version(row.version, content, row.created, row.source)
                versions.setdefault(row.adapter_id, []).append(version)
            grantees: dict[tuple[str, str], list[str]] = {}
            names = [row.name for row in rows]
            for share in connection.execute(select(SHARES).where(SHARES.c.name.in_(names))):
                grantees.setdefault((share.owner, share.name), []).append(share.grantee)
        for row in rows:
            own = versions.get(row.id)
            # Each statement sees a state of its own: a name that was deleted or grew in between.
            if own and own[0].number <= row.active_version <= own[-1].number:
                yield Adapter(
                    owner=row.owner,
                    name=row.name,
                    base_digest=row.base_digest,
                    active=row.active_version,
                    versions=tuple(own),
                    tags=row.tags,
                    grantees=tuple(grantees.get((row.owner, row.name), ())),
                )
        last = rows[-1].id


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


# --------------------------------------------------------------------------------------- import


def import_archive(
    database: Database,
    store: Store,
    bases: Path,
    source: BinaryIO,
    *,
    on_base: Callable[[str], object] = lambda basis_id: None,
    mend: bool = False,
    progress: Progress = lambda done, of: None,
) -> Outcome:
    """Publish the adapters of an archive, batch by batch: each is durable before its names exist.

    Args:
        source: an archive, compressed or not; need not seek.
        on_base: told the id of each basis that is in the folder now, before an adapter needs it.
        mend: also read what is there already, and write it anew where it is missing or damaged.

    Raises:
        AdapterRejected: not an archive, cut off, or a record with another digest. The batches
            before are in.
        RegistryUnavailable: the same; run it again.
    """
    outcome = Outcome()
    done, total = 0, None
    batch: list[Adapter] | None = None
    ended = False
    try:
        with tarfile.open(fileobj=source, mode="r|*") as tar:
            for member in tar:
                match = _MEMBER.fullmatch(member.name)
                file = tar.extractfile(member) if match and member.isreg() else None
                if match is None or file is None:
                    raise AdapterRejected(f"archive: {member.name[:200]!r}", "does not belong here")
                if member.name == "shoal.json":
                    total = _read_head(file.read(4096))
                elif member.name == "end.json":
                    ended = True
                elif match[1]:
                    _import_base(bases, match[1], member, file, mend)
                    on_base(match[1])
                elif match[2] == "adapters":
                    batch = _read_lines(member, file)
                elif batch is None:
                    raise AdapterRejected(f"archive: {member.name}", "comes before its adapters")
                else:
                    _import_batch(database, store, batch, member, file, outcome, mend)
                    done += len(batch)
                    batch = None
                    progress(done, total)
                # Or the list of all members grows for ever.
                tar.members = []  # type: ignore[attr-defined]
    except (tarfile.TarError, EOFError) as error:
        raise AdapterRejected("archive", f"is damaged or cut off: {error}") from error
    if batch is not None or total is None or not ended:
        raise AdapterRejected("archive", "is cut off or not one of shoal's")
    return outcome


def _read_head(data: bytes) -> int:
    try:
        head = json.loads(data)
        if head["format"] == FORMAT and type(head["adapters"]) is int:
            return int(head["adapters"])
    except (ValueError, KeyError, TypeError):
        pass
    raise AdapterRejected("archive: shoal.json", f"must be of an archive of format {FORMAT}")


def _read_lines(member: tarfile.TarInfo, file: Any) -> list[Adapter]:
    if member.size > LINES_BYTES_MAX:
        raise AdapterRejected(f"archive: {member.name}", f"is limited to {LINES_BYTES_MAX} bytes")
    adapters = []
    for number, line in enumerate(file.read().splitlines(), start=1):
        try:
            adapters.append(_from_json(json.loads(line)))
        except (ValueError, KeyError, TypeError, RecursionError, AdapterError) as error:
            said = f"must be an adapter as the export writes it ({error!r:.200})"
            raise AdapterRejected(f"archive: {member.name} line {number}", said) from error
    return adapters


def _import_batch(
    database: Database,
    store: Store,
    adapters: Sequence[Adapter],
    member: tarfile.TarInfo,
    file: Any,
    outcome: Outcome,
    mend: bool,
) -> None:
    wanted = missing(database, adapters)
    outcome.unchanged += len(adapters) - len(wanted)
    digests = {version.content.digest for a in wanted for version in a.versions}
    broken: set[str] = set()
    if mend:
        every = {version.content.digest for a in adapters for version in a.versions}
        broken = {d for d in referred(database, every) if not _is_whole(store, d)}
        digests |= broken
    small: dict[str, bytes] = {}
    size = 0
    found: set[str] = set()
    if digests:
        for digest, payload in frames(member.name, _forward(file)):
            if digest not in digests or digest in found:
                continue
            try:
                stored.verify(digest, payload, member.name)
            except RecordDamaged as error:
                raise AdapterRejected(f"archive: {member.name}", str(error)) from error
            found.add(digest)
            # A pack is read after a file, which may be what is damaged.
            alone = digest in broken and store.exists(digest)
            if alone or len(payload) > PACKED_BYTES_MAX:
                # What is there already is not written again, so nobody may be collecting it.
                database.transact(partial(garbage.spare, digest=digest, now=time.time()))
                store.put(digest, stored.decode(digest, payload, member.name))
                continue
            small[digest] = payload
            size += len(payload)
            if size >= BATCH_BYTES:
                store.put_many(list(small.items()))
                small, size = {}, 0
    lost = digests - found
    if lost:
        raise AdapterRejected(f"archive: {member.name}", f"lacks the record {min(lost)}")
    if small:
        store.put_many(list(small.items()))
    outcome.mended += len(broken)
    if wanted:
        now = publish_many(database, wanted)
        outcome.added += now.added
        outcome.updated += now.updated
        outcome.unchanged += now.unchanged
        outcome.refused += now.refused


def _is_whole(store: Store, digest: str) -> bool:
    try:
        store.get_stored(digest)
    except RecordDamaged:
        return False
    return True


def _forward(file: Any) -> Callable[[str, int, int | None], bytes]:
    """Reads of rising offsets, from what can only be read on."""
    at = 0

    def read(_: str, start: int, end: int | None) -> bytes:
        nonlocal at
        assert end is not None
        if end - start > RECORD_BYTES_MAX:
            raise AdapterRejected("archive", f"records are limited to {RECORD_BYTES_MAX} bytes")
        if start > at:
            file.read(start - at)
        data: bytes = file.read(end - start)
        at = start + len(data)
        return data

    return read


def _import_base(
    bases: Path, basis_id: str, member: tarfile.TarInfo, file: Any, mend: bool
) -> None:
    path = bases / f"{basis_id}.safetensors"
    where = f"archive: {member.name}"
    if member.size > BASE_BYTES_MAX:
        raise AdapterRejected(where, f"is limited to {BASE_BYTES_MAX} bytes")
    if path.exists() and not (mend and _sha256(path) != basis_id):
        return
    bases.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=bases, prefix=".import.")
    try:
        digest = hashlib.sha256()
        with os.fdopen(handle, "wb") as out:
            while some := file.read(1 << 20):
                digest.update(some)
                out.write(some)
            out.flush()
            os.fsync(out.fileno())
        if digest.hexdigest() != basis_id:
            raise AdapterRejected(where, f"has sha256 {digest.hexdigest()}")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ----------------------------------------------------------------------------------------- json


def _to_json(adapter: Adapter) -> dict[str, Any]:
    return {
        "owner": adapter.owner,
        "name": adapter.name,
        "base": adapter.base_digest,
        "active": adapter.active,
        "tags": dict(adapter.tags),
        "grantees": list(adapter.grantees),
        "versions": [
            {
                "version": version.number,
                "created": version.created,
                "source": version.source,
                "basis_id": version.content.basis_id,
                **{name: getattr(version.content, name) for name in _CONTENT},
            }
            for version in adapter.versions
        ],
    }


_CONTENT: dict[str, type] = {
    "digest": str,
    "family": str,
    "format": str,
    "rank": int,
    "bytes": int,
    "packed_elements": int,
}


def _from_json(line: dict[str, Any]) -> Adapter:
    versions = tuple(_version(each) for each in line["versions"])
    numbers = [version.number for version in versions]
    active, base_digest, owner = line["active"], line["base"], line["owner"]
    if (
        not numbers
        or numbers != list(range(numbers[0], numbers[0] + len(numbers)))
        or numbers[0] < 1
    ):
        raise ValueError("versions must count up from 1 or more")
    if active not in numbers or not stored.is_digest(base_digest):
        raise ValueError("active must be a version, and base a digest")
    grantees = tuple(line["grantees"])
    if not all(isinstance(each, str) and len(each) <= 128 for each in (owner, *grantees)):
        raise ValueError("owner and grantees must be short strings")
    return Adapter(
        owner=validate_name(owner) if owner else "",
        name=validate_name(line["name"]),
        base_digest=base_digest,
        active=active,
        versions=versions,
        tags=validate_tags(line["tags"]),
        grantees=grantees,
    )


def _version(line: dict[str, Any]) -> Version:
    for name, kind in _CONTENT.items():
        if type(line[name]) is not kind or (kind is int and not 0 <= line[name] < 1 << 62):
            raise ValueError(f"{name} is {line[name]!r:.100}")
    if not stored.is_digest(line["digest"]) or line["family"] not in get_args(Family):
        raise ValueError("digest must be a sha256 and family a known one")
    if line["source"] not in get_args(Source) or type(line["version"]) is not int:
        raise ValueError("source must be a known one and version an integer")
    basis_id = line["basis_id"]
    if basis_id is not None and (not isinstance(basis_id, str) or len(basis_id) > 64):
        raise ValueError("basis_id must be a short string or null")
    content = Content(**{name: line[name] for name in _CONTENT}, basis_id=basis_id)
    return Version(line["version"], content, float(line["created"]), line["source"])
