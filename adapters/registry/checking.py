"""What must hold of the catalog's tables, for tests."""

from collections import Counter

from sqlalchemy import select

from shoal.adapters.registry.database import Database
from shoal.adapters.registry.tables import ADAPTERS, OWNERS, SHARES, TOTALS, VERSIONS
from shoal.adapters.registry.totals import Amount
from shoal.adapters.spec import ADAPTER_NAME


def check(database: Database) -> None:
    """Assert it of every adapter in the database. O(versions)."""
    numbers: dict[int, list[int]] = {}
    sizes: Counter[int] = Counter()
    with database.write() as connection:
        columns = VERSIONS.c.adapter_id, VERSIONS.c.version, VERSIONS.c.bytes
        for row in connection.execute(select(*columns)):
            numbers.setdefault(row.adapter_id, []).append(row.version)
            sizes[row.adapter_id] += row.bytes
        rows = connection.execute(select(ADAPTERS)).all()
        totals = connection.execute(select(TOTALS)).all()
        owners = connection.execute(select(OWNERS)).all()
        shared = connection.execute(select(SHARES.c.owner, SHARES.c.name)).all()
    live = [row for row in rows if row.deleted_at is None]
    counted = Counter((row.owner, row.base_digest) for row in live)
    assert {(row.owner, row.base_digest): row.names for row in totals if row.names} == counted
    have: dict[str, Amount] = {}
    for row in live:
        names, size = have.get(row.owner, Amount(0, 0))
        have[row.owner] = Amount(names + 1, size + sizes[row.id])
    assert {row.owner: Amount(row.names, row.bytes) for row in owners if row.names} == have
    assert not [row for row in owners if row.bytes and not row.names]
    assert set(map(tuple, shared)) <= {(row.owner, row.name) for row in live}
    assert set(numbers) == {row.id for row in live}, "versions without an adapter, or reverse"
    for row in rows:
        assert ADAPTER_NAME.fullmatch(row.name), row
        assert 1 <= row.live_from <= row.active_version < row.next_version, row
    for row in live:
        assert sorted(numbers[row.id]) == list(range(row.live_from, row.next_version)), row
