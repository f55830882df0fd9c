"""What lies in a store for a digest: the record itself, or its compact form.

Owns the check that every read makes. A digest is the sha256 of the record, whatever form is
stored, so both forms are verified by expanding and hashing.
"""

import hashlib
import re
from collections.abc import Callable

from shoal.adapters import compact
from shoal.adapters.registry.errors import RecordDamaged

# ``decode`` or ``verified``: checks what is stored for a digest at a place, and gives a form of it.
Form = Callable[[str, bytes, str], bytes]

_DIGEST = re.compile(r"[0-9a-f]{64}")


def key(digest: str) -> tuple[str, str, str]:
    """The parts of the path of a record: two levels of 256 folders."""
    assert _DIGEST.fullmatch(digest), f"not a sha256 in hex: {digest!r}"
    return digest[:2], digest[2:4], digest


def is_digest(text: str) -> bool:
    """Whether ``text`` is a sha256 in hex."""
    return _DIGEST.fullmatch(text) is not None


def encode(digest: str, record: bytes) -> bytes:
    """What to store for ``record``: its compact form where it has one."""
    assert hashlib.sha256(record).hexdigest() == digest, "the digest is not that of the data"
    return compact.compact(record) or record


def decode(digest: str, stored: bytes, where: str) -> bytes:
    """The record of what is stored at ``where``, verified.

    Raises:
        RecordDamaged: it is not that of ``digest``.
    """
    record = stored
    if stored.startswith(compact.MAGIC):
        try:
            record = compact.expand(stored)
        except ValueError as error:
            raise RecordDamaged(f"record {digest} is damaged: {error} ({where})") from error
    found = hashlib.sha256(record).hexdigest()
    if found != digest:
        raise RecordDamaged(f"record {digest} is damaged: its bytes have sha256 {found} ({where})")
    return record


def verify(digest: str, stored: bytes, where: str) -> None:
    """What ``decode`` checks, without making the record.

    Raises:
        RecordDamaged: as ``decode``.
    """
    if not stored.startswith(compact.MAGIC):
        decode(digest, stored, where)
        return
    try:
        found = compact.record_sha256(stored)
    except ValueError as error:
        raise RecordDamaged(f"record {digest} is damaged: {error} ({where})") from error
    if found != digest:
        raise RecordDamaged(f"record {digest} is damaged: its bytes have sha256 {found} ({where})")


def verified(digest: str, stored: bytes, where: str) -> bytes:
    """What ``encode`` gives for the record of what is stored at ``where``, without making it.

    Raises:
        RecordDamaged: as ``decode``.
    """
    verify(digest, stored, where)
    return stored if stored.startswith(compact.MAGIC) else compact.compact(stored) or stored


def missing(digest: str, where: str) -> RecordDamaged:
    """That nothing is stored at ``where``."""
    return RecordDamaged(f"record {digest} is missing from the store ({where})")
