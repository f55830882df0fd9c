"""API keys: shown once, hashed at rest, refused soon after they are revoked."""

import hashlib
import random
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import event, select, update

from shoal.adapters.errors import AdapterRejected
from shoal.adapters.registry.database import Database
from shoal.adapters.registry.errors import KeyNotFound
from shoal.adapters.registry.keys import CACHE_S, WEIGHT_MAX, Keys, Limits
from shoal.adapters.registry.tables import KEYS


class Time:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def keys(database: Database, time: Time) -> Keys:
    return Keys(database, monotonic=time, clock=lambda: 50.0)


def test_a_key_is_what_it_was_made_as(keys: Keys, database: Database) -> None:
    assert not keys.exist()
    limits = Limits(requests_per_minute=60, adapters=0, bytes=2**40)
    key, secret = keys.create(role="tenant", owner="ann", label="Ann's laptop", limits=limits)
    assert (key.role, key.owner, key.label) == ("tenant", "ann", "Ann's laptop")
    assert (key.created, key.revoked, key.limits) == (50.0, None, limits)
    assert keys.verify(secret) == key
    assert Keys(database).verify(secret) == key, "not only from the cache"
    assert keys.page() == ([key], None)
    assert keys.exist()


def test_the_secret_is_nowhere_in_the_database(keys: Keys, database: Database) -> None:
    key, secret = keys.create(role="read-only", owner="ann")
    with database.read() as connection:
        row = connection.execute(select(KEYS)).one()
    assert row.secret_sha256 == hashlib.sha256(secret.encode()).hexdigest()
    private = secret.removeprefix(f"shoal_{key.id}_")
    assert len(private) == 43
    assert private not in repr(tuple(row)) + repr(key) + repr(vars(keys))


def test_every_other_text_is_refused(keys: Keys) -> None:
    _, secret = keys.create(role="tenant", owner="ann")
    _, other = keys.create(role="tenant", owner="bob")
    rng = random.Random(0)
    changed = {secret[:at] + rng.choice("abcXYZ019") + secret[at + 1 :] for at in range(66)}
    crossed = {secret[:23] + other[23:], other[:23] + secret[23:]}
    odd = {
        "",
        "shoal_",
        secret + "a",
        secret[:-1],
        secret + "\n",
        " " + secret,
        "\ud800",
        "x" * 10**6,
    }
    for wrong in (changed | crossed | odd) - {secret, other}:
        assert keys.verify(wrong) is None, wrong[:80]
    assert keys.verify(secret) is not None


def test_a_revoked_key_is_refused_here_at_once_and_elsewhere_within_seconds(
    keys: Keys, database: Database, time: Time
) -> None:
    elsewhere = Keys(database, monotonic=time)
    key, secret = keys.create(role="admin", owner="")
    assert keys.verify(secret) == elsewhere.verify(secret) == key
    assert keys.revoke(key.id).revoked == 50.0
    assert keys.verify(secret) is None
    time.now += CACHE_S
    assert elsewhere.verify(secret) is None
    assert keys.revoke(key.id).revoked == 50.0, "twice is once"
    assert keys.page()[0][0].revoked == 50.0
    assert keys.exist(), "no keys that work is not the same as no keys"
    assert CACHE_S <= 5.0


def test_using_a_key_does_not_prolong_what_is_believed(
    keys: Keys, database: Database, time: Time
) -> None:
    key, secret = keys.create(role="tenant", owner="ann")
    assert keys.verify(secret)
    with database.write() as connection:
        connection.execute(update(KEYS).where(KEYS.c.id == key.id).values(revoked=1.0))
    for _ in range(20):
        time.now += CACHE_S / 10
        keys.verify(secret)
    assert keys.verify(secret) is None


def test_a_good_key_asks_the_database_once_in_a_while_and_memory_is_bounded(
    keys: Keys, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def capture(_c: object, _cursor: object, statement: str, *_: object) -> None:
        asked.append(statement)

    engine: Any = database._engine
    secrets = [keys.create(role="tenant", owner=f"o{n}")[1] for n in range(5)]
    event.listen(engine, "before_cursor_execute", capture)
    for _ in range(10):
        assert keys.verify(secrets[0])
    assert len(asked) == 1
    monkeypatch.setattr("shoal.adapters.registry.keys.CACHED_MAX", 3)
    for secret in secrets * 2:
        assert keys.verify(secret)
    assert len(keys._verified) == 3
    event.remove(engine, "before_cursor_execute", capture)


def test_keys_are_listed_page_by_page(keys: Keys) -> None:
    made = sorted(keys.create(role="tenant", owner="ann")[0].id for _ in range(7))
    found: list[str] = []
    after: str | None = ""
    while after is not None:
        page, after = keys.page(limit=3, after=after)
        assert len(page) <= 3
        found += [key.id for key in page]
    assert found == made


@pytest.mark.parametrize(
    "values",
    [
        {"role": "root"},
        {"owner": ""},
        {"owner": "Ann"},
        {"owner": "*"},
        {"owner": "a/b"},
        {"label": "x" * 129},
        {"label": "two\nlines"},
        {"limits": Limits(adapters=-1)},
        {"limits": Limits(bytes=2**63)},
        {"limits": Limits(tokens_per_minute=True)},
        {"limits": Limits(tokens_per_minute=1.5)},  # type: ignore[arg-type]
        {"limits": Limits(weight=0)},
        {"limits": Limits(weight=WEIGHT_MAX + 1)},
        {"limits": Limits(weight=True)},
        {"limits": Limits(weight=None)},  # type: ignore[arg-type]
    ],
)
def test_values_that_a_key_cannot_have_are_refused(keys: Keys, values: dict[str, Any]) -> None:
    with pytest.raises(AdapterRejected, match=next(iter(values)).removesuffix("s")):
        keys.create(**({"role": "tenant", "owner": "ann"} | values))
    assert not keys.exist()


@pytest.mark.parametrize("key_id", ["", "0" * 16, "x", "\x00", "\ud800", "%", "a" * 10_000])
def test_a_key_that_does_not_exist_cannot_be_revoked(keys: Keys, key_id: str) -> None:
    with pytest.raises(KeyNotFound) as caught:
        keys.revoke(key_id)
    assert len(str(caught.value)) < 200


def test_a_limit_that_a_newer_release_added_does_not_lock_anybody_out(
    keys: Keys, database: Database
) -> None:
    key, secret = keys.create(role="tenant", owner="ann", limits=Limits(adapters=3))
    with database.write() as connection:
        connection.execute(update(KEYS).values(limits={"adapters": 3, "petaflops": 1}))
    assert keys.verify(secret) == key


def test_changed_limits_hold_here_at_once_and_elsewhere_within_seconds(
    keys: Keys, database: Database, time: Time
) -> None:
    elsewhere = Keys(database, monotonic=time)
    key, secret = keys.create(role="tenant", owner="ann", limits=Limits(adapters=3, weight=5))
    other, other_secret = keys.create(role="tenant", owner="ann")
    for known in (keys, elsewhere):
        assert known.verify(secret) == key
    limits = Limits(bytes=9, weight=WEIGHT_MAX)
    changed = keys.change(key.id, limits=limits)
    assert changed == replace(key, limits=limits)
    assert keys.verify(secret) == keys.get(key.id) == changed
    time.now += CACHE_S
    assert elsewhere.verify(secret) == changed
    assert keys.verify(other_secret) == other, "no other key has changed"


def test_a_refused_change_changes_nothing(keys: Keys) -> None:
    key, _ = keys.create(role="tenant", owner="ann", limits=Limits(adapters=3))
    with pytest.raises(AdapterRejected, match="limit adapters"):
        keys.change(key.id, limits=Limits(adapters=-1))
    for call in (lambda id: keys.change(id, limits=Limits()), keys.get):
        for wrong in ("0" * 16, "\ud800"):
            with pytest.raises(KeyNotFound):
                call(wrong)
    assert keys.get(key.id) == key


def test_a_revoked_key_stays_revoked_when_its_limits_change(keys: Keys) -> None:
    key, secret = keys.create(role="tenant", owner="ann")
    keys.revoke(key.id)
    assert keys.change(key.id, limits=Limits(adapters=1)).revoked == 50.0
    assert keys.verify(secret) is None


def test_one_owners_keys_are_listed(keys: Keys) -> None:
    made = {owner: {keys.create(role="admin", owner=owner)[0].id} for owner in ("ann", "bob", "")}
    made["ann"].add(keys.create(role="read-only", owner="ann")[0].id)
    for owner, ids in made.items():
        page, after = keys.page(limit=1, owner=owner)
        if after is not None:
            rest, after = keys.page(limit=1, owner=owner, after=after)
            page += rest
        assert after is None
        assert {key.id for key in page} == ids
        assert {key.owner for key in page} == {owner}
    assert keys.page(owner="nobody") == ([], None)
