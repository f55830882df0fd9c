"""How long look-ups take with a million adapters. Not part of the suite::

    python -m tests.adapters.measure_catalog sqlite:////tmp/million.db
    python -m tests.adapters.measure_catalog postgresql+psycopg://user@host/name

Fills the database when it is empty, in one statement a table and past the catalog's rules.
"""

import argparse
import json
import random
import time
from collections.abc import Callable

from sqlalchemy import Connection, text
from tests.adapters.databases import BASE, content

from shoal.adapters.registry.catalog import Catalog
from shoal.adapters.registry.database import Database

OWNER = "ann"
# Coprime to the number of rows: names do not come in the order of ids.
STRIDE = 7_919_317


def name_of(number: int, rows: int) -> str:
    return f"user-{number * STRIDE % rows:09d}"


def fill(connection: Connection, rows: int) -> None:
    """Adapter ``n`` of ``rows`` has one version; every tenth is shared with bob."""
    sqlite = connection.dialect.name == "sqlite"
    number = f"n * {STRIDE} % {rows}"
    if sqlite:
        counted = f"SELECT 1 UNION ALL SELECT n + 1 FROM s WHERE n < {rows}"
        series = f"(WITH RECURSIVE s(n) AS ({counted}) SELECT n FROM s)"
        digest, name = "lower(hex(randomblob(32)))", f"printf('user-%09d', {number})"
    else:
        connection.execute(text("SET LOCAL statement_timeout = 0"))
        series = f"generate_series(1::bigint, {rows}) AS s(n)"
        digest = "encode(sha256(n::text::bytea), 'hex')"
        name = f"'user-' || lpad(({number})::text, 9, '0')"
    for statement in (
        "INSERT INTO adapters (id, owner, name, base_digest, active_version, next_version, "
        f"live_from) SELECT n, '{OWNER}', {name}, '{BASE}', 1, 2, 1 FROM {series}",
        "INSERT INTO versions (adapter_id, version, digest, family, format, rank, bytes, "
        f"packed_elements, base_digest, source, created) SELECT n, 1, {digest}, 'core', "
        f"'lora_xs', 4, 7000, 3360, '{BASE}', 'upload', 0.0 FROM {series}",
        f"INSERT INTO shares (owner, name, grantee) SELECT '{OWNER}', {name}, 'bob' "
        f"FROM {series} WHERE n % 10 = 0",
        f"INSERT INTO totals (owner, base_digest, names) VALUES ('{OWNER}', '{BASE}', {rows})",
        f"INSERT INTO owners (owner, names, bytes) VALUES ('{OWNER}', {rows}, {7000 * rows})",
    ):
        connection.execute(text(statement))
    if not sqlite:
        # What inserting by hand must do for Catalog.publish, which takes ids from the sequence.
        connection.execute(text(f"SELECT setval('adapters_id_seq', {rows})"))


def measure(call: Callable[[int], object], times: int) -> dict[str, float]:
    """Milliseconds of ``times`` calls, after a few that warm up."""
    for number in range(50):
        call(number)
    took = []
    for number in range(times):
        start = time.perf_counter()
        call(number)
        took.append(1000 * (time.perf_counter() - start))
    took.sort()
    return {
        "p50_ms": round(took[len(took) // 2], 3),
        "p99_ms": round(took[int(0.99 * len(took))], 3),
        "max_ms": round(took[-1], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--times", type=int, default=5000)
    arguments = parser.parse_args()
    rows: int = arguments.rows
    start = time.perf_counter()
    database = Database(arguments.url)
    opened_s = time.perf_counter() - start
    catalog = Catalog(database, base_digest=BASE, owner=OWNER)
    reader = Catalog(database, base_digest=BASE, owner="bob")
    start = time.perf_counter()
    if catalog.count() == 0:
        with database.write() as connection:
            fill(connection, rows)
        with database.write() as connection:
            connection.execute(text("ANALYZE"))
    filled_s = time.perf_counter() - start
    rng = random.Random(0)

    def some() -> str:
        return name_of(rng.randrange(rows), rows)

    def shared() -> str:
        return f"{OWNER}/{name_of(10 * rng.randrange(1, rows // 10), rows)}"

    few = max(arguments.times // 10, 1)
    figures = {
        "get": measure(lambda _: catalog.get(some()), arguments.times),
        "get shared": measure(lambda _: reader.get(shared()), arguments.times),
        "page of 100": measure(lambda _: catalog.page(limit=100, after=some()), few),
        "page by prefix": measure(lambda _: catalog.page(limit=100, prefix=some()[:-2]), few),
        "page of shared": measure(lambda _: reader.shared_page(limit=100, after=shared()), few),
        "count": measure(lambda _: catalog.count(), few),
        "publish": measure(
            lambda n: catalog.publish(f"new-{n}", content(rng.random()), created=0.0), few
        ),
        "tag": measure(lambda n: catalog.tag(f"new-{n}", {"n": str(n)}), few),
    }
    print(f"opened in {opened_s:.2f} s, filled in {filled_s:.0f} s")
    for what, figure in figures.items():
        print(f"{what:15} " + "  ".join(f"{key} {value:8.3f}" for key, value in figure.items()))
    print(json.dumps({"url": arguments.url.split(":")[0], "rows": rows, **figures}))
    database.close()


if __name__ == "__main__":
    main()
