"""API keys: who may do what, on whose behalf, and how much.

A secret is 256 random bits and only its sha256 is stored, so it can neither be read back nor
guessed; that is also why a slow password hash would add nothing. Knows nothing of HTTP.
"""

import hashlib
import hmac
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, cast, get_args

from sqlalchemy import ColumnElement, Connection, Row, bindparam, insert, select, update

from shoal.adapters.errors import AdapterRejected
from shoal.adapters.registry.database import Database
from shoal.adapters.registry.errors import KeyNotFound, RegistryUnavailable
from shoal.adapters.registry.names import SHIPPED_OWNER, validate_owner
from shoal.adapters.registry.tables import KEYS

Role = Literal["admin", "tenant", "read-only"]
ROLES: tuple[Role, ...] = get_args(Role)

# How long a revoked key may still be accepted by a process that has just seen it.
CACHE_S = 2.0
CACHED_MAX = 10_000
# How long a key that was good is believed while the database cannot be asked.
OUTAGE_S = 3600.0
LABEL_MAX = 128
PAGE_MAX = 1000
# As the scheduler's (``server/engine/fairness.py``), which may not be imported here.
WEIGHT_MAX = 1024
_LIMIT_MAX = 2**62

_ID = re.compile(r"[0-9a-f]{16}")
# shoal_<id>_<secret>. Without a fixed length nothing is hashed or looked up.
_SECRET = re.compile(r"shoal_([0-9a-f]{16})_[A-Za-z0-9_-]{43}")
_BY_ID = select(KEYS).where(KEYS.c.id == bindparam("wanted"))


@dataclass(frozen=True, slots=True)
class Limits:
    """What a key's owner may take; None is no limit.

    What is counted is the owner's, over all of its keys; a request is held to the limits of the
    key that it came with.

    Attributes:
        requests_per_minute: at this rate in the long run, and as many at once.
        tokens_per_minute: likewise; of prompts and answers.
        concurrent_requests: accepted and not yet answered.
        adapters: live names.
        bytes: of the canonical records of all live versions.
        weight: share of a busy server relative to other owners', from 1 to ``WEIGHT_MAX``.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_requests: int | None = None
    adapters: int | None = None
    bytes: int | None = None
    weight: int = 1


@dataclass(frozen=True, slots=True)
class Key:
    """What is known of a key; its secret is not.

    Attributes:
        id: public; part of the secret's text, and what ``revoke`` takes.
        owner: whose adapters its bearer works with. '' owns what was made without keys, and
            only an admin may have it.
        created, revoked: unix times in seconds.
    """

    id: str
    role: Role
    owner: str
    label: str
    created: float
    revoked: float | None = None
    limits: Limits = field(default_factory=Limits)


class Keys:
    """The keys in a database; thread-safe. All methods may raise RegistryUnavailable.

    Args:
        database: not closed by this.
        cache_s: for how long a verified key is believed without asking the database.
        clock: unix time in seconds.
        monotonic: seconds for the cache, which a clock that is set does not disturb.
    """

    def __init__(
        self,
        database: Database,
        *,
        cache_s: float = CACHE_S,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._cache_s = cache_s
        self._clock = clock
        self._monotonic = monotonic
        self._lock = threading.Lock()
        # By hash, so that secrets do not stay in memory. Only keys that were good.
        self._verified: OrderedDict[str, tuple[Key, float]] = OrderedDict()
        self._changes = 0  # what was read before one is not to be believed after it

    def create(
        self, *, role: Role, owner: str, label: str = "", limits: Limits | None = None
    ) -> tuple[Key, str]:
        """Make a key.

        Returns:
            The key and its secret, which cannot be had again.

        Raises:
            AdapterRejected: a value that a key cannot have.
        """
        limits = limits or Limits()
        _validate(role, owner, label, limits)
        key = Key(secrets.token_hex(8), role, owner, label, self._clock(), None, limits)
        secret = f"shoal_{key.id}_{secrets.token_urlsafe(32)}"
        values = {
            "id": key.id,
            "secret_sha256": _hash(secret),
            "role": role,
            "owner": owner,
            "label": label,
            "created": key.created,
            "revoked": None,
            "limits": _to_stored(limits),
        }
        self._database.transact(lambda connection: connection.execute(insert(KEYS).values(values)))
        return key, secret

    def verify(self, secret: str) -> Key | None:
        """The key that ``secret`` belongs to; None if there is none or it was revoked.

        A key that was verified less than ``cache_s`` ago is not looked up again. While the
        database cannot be reached, one that was good within ``OUTAGE_S`` still is.
        """
        match = _SECRET.fullmatch(secret)
        if match is None:
            return None
        hashed = _hash(secret)
        now = self._monotonic()
        with self._lock:
            known = self._verified.get(hashed)
            changes = self._changes
        if known is not None and now < known[1]:
            return known[0]
        try:
            with self._database.read() as connection:
                row = connection.execute(_BY_ID, {"wanted": match[1]}).one_or_none()
        except RegistryUnavailable:
            if known is not None and now < known[1] + OUTAGE_S:
                return known[0]
            raise
        # Compared in a time that does not depend on where they differ.
        stored = "" if row is None else row.secret_sha256
        same = hmac.compare_digest(hashed, stored)
        with self._lock:
            if row is None or not same or row.revoked is not None:
                self._verified.pop(hashed, None)
                return None
            key = _to_key(row)
            if changes == self._changes:
                self._verified[hashed] = key, now + self._cache_s
                self._verified.move_to_end(hashed)
            while len(self._verified) > CACHED_MAX:
                self._verified.popitem(last=False)
        return key

    def remembered(self, secret: str) -> Key | None:
        """As ``verify``, from memory alone: None also when the database has to be asked."""
        with self._lock:
            known = self._verified.get(_hash(secret))
        return known[0] if known is not None and self._monotonic() < known[1] else None

    def get(self, key_id: str) -> Key:
        """The key of this id, revoked or not, or KeyNotFound."""
        _check_id(key_id)
        with self._database.read() as connection:
            row = connection.execute(_BY_ID, {"wanted": key_id}).one_or_none()
        if row is None:
            raise _not_found(key_id)
        return _to_key(row)

    def page(
        self, *, limit: int = PAGE_MAX, after: str = "", owner: str | None = None
    ) -> tuple[list[Key], str | None]:
        """Keys by id, revoked ones too.

        Args:
            limit: keys at most, from 1; above ``PAGE_MAX`` it counts as that.
            after: only ids behind this one; the cursor of the page before.
            owner: only this one's; None is everybody's.

        Returns:
            The page, and the cursor of the next one or None.
        """
        if limit < 1:
            raise ValueError(f"limit must be at least 1, not {limit}")
        limit = min(limit, PAGE_MAX)
        query = select(KEYS).where(KEYS.c.id > after).order_by(KEYS.c.id).limit(limit + 1)
        if owner is not None:
            query = query.where(KEYS.c.owner == owner)
        with self._database.read() as connection:
            found = [_to_key(row) for row in connection.execute(query)]
        if len(found) <= limit:
            return found, None
        return found[:limit], found[limit - 1].id

    def exist(self) -> bool:
        """Whether any key was ever made, revoked or not: from then on, none means no access."""
        with self._database.read() as connection:
            return connection.execute(select(KEYS.c.id).limit(1)).one_or_none() is not None

    def revoke(self, key_id: str) -> Key:
        """Let a key be refused: here at once, elsewhere within ``cache_s``. Twice is once.

        Raises:
            KeyNotFound: no such key.
        """
        return self._update(key_id, {"revoked": self._clock()}, KEYS.c.revoked.is_(None))

    def change(self, key_id: str, *, limits: Limits) -> Key:
        """Give a key other limits: they hold here at once, elsewhere within ``cache_s``.

        Raises:
            KeyNotFound: no such key.
            AdapterRejected: limits that a key cannot have.
        """
        _validate_limits(limits)
        return self._update(key_id, {"limits": _to_stored(limits)})

    def _update(
        self, key_id: str, values: Mapping[str, object], *only_if: ColumnElement[bool]
    ) -> Key:
        _check_id(key_id)

        def work(connection: Connection) -> tuple[str, Key]:
            this = KEYS.c.id == key_id
            connection.execute(update(KEYS).where(this, *only_if).values(**values))
            row = connection.execute(select(KEYS).where(this)).one_or_none()
            if row is None:
                raise _not_found(key_id)
            return row.secret_sha256, _to_key(row)

        hashed, key = self._database.transact(work)
        with self._lock:
            self._verified.pop(hashed, None)
            self._changes += 1
        return key


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _validate(role: str, owner: str, label: str, limits: Limits) -> None:
    if role not in ROLES:
        raise AdapterRejected(f"role {role!r}", f"must be one of {', '.join(ROLES)}")
    if owner or role != "admin":
        validate_owner(owner)
    if owner == SHIPPED_OWNER:
        raise AdapterRejected(f"owner {owner!r}", "is reserved: it owns the shipped adapters")
    if len(label) > LABEL_MAX or not label.isprintable():
        raise AdapterRejected(
            f"label {label[:100]!r}", f"must be at most {LABEL_MAX} printable characters"
        )
    _validate_limits(limits)


def _validate_limits(limits: Limits) -> None:
    for name, value in asdict(limits).items():
        if name == "weight":
            continue
        is_count = type(value) is int and 0 <= value <= _LIMIT_MAX
        if value is not None and not is_count:
            raise AdapterRejected(f"limit {name}", f"must be a count from 0, not {value!r}")
    weight = limits.weight
    if type(weight) is not int or not 1 <= weight <= WEIGHT_MAX:
        raise AdapterRejected("limit weight", f"must be from 1 to {WEIGHT_MAX}, not {weight!r}")


def _check_id(key_id: str) -> None:
    # Before a database sees it: it may not even be valid Unicode.
    if _ID.fullmatch(key_id) is None:
        raise _not_found(key_id)


def _not_found(key_id: str) -> KeyNotFound:
    return KeyNotFound(f"key {key_id[:100]!r} does not exist")


def _to_key(row: Row[Any]) -> Key:
    return Key(
        id=row.id,
        role=cast(Role, row.role),
        owner=row.owner,
        label=row.label,
        created=row.created,
        revoked=row.revoked,
        limits=_to_limits(row.limits),
    )


def _to_stored(limits: Limits) -> dict[str, int]:
    """Without what is as if it were not there, so that defaults may be added to."""
    default = asdict(Limits())
    return {name: n for name, n in asdict(limits).items() if n != default[name]}


def _to_limits(stored: Mapping[str, int]) -> Limits:
    # One that a newer release added is left out rather than refused.
    return Limits(**{f.name: stored[f.name] for f in fields(Limits) if f.name in stored})
