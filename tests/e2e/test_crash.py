"""``kill -9`` at random moments of uploads, activations and deletions, while clients read.

CI makes a few dozen changes. The whole test, on SQLite and on PostgreSQL::

    SHOAL_CRASH_CHANGES=500 SHOAL_CRASH_KILLS=32 pytest -s tests/e2e/test_crash.py

``SHOAL_CRASH_SEED`` draws other changes and moments (default 1).
"""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from tests.adapters.databases import postgres
from tests.e2e.crash_clients import ANSWER_TOKENS, Material, Visit, World, settle
from tests.e2e.crash_server import Forge

from shoal.adapters.registry.database import Database
from shoal.adapters.registry.registry import Registry
from shoal.adapters.registry.store import open_store, places
from shoal.adapters.registry.tables import GARBAGE, VERSIONS
from shoal.server.__main__ import main

__all__ = ["postgres"]

CHANGES = int(os.environ.get("SHOAL_CRASH_CHANGES", "40"))
KILLS = int(os.environ.get("SHOAL_CRASH_KILLS", "3"))
SEED = int(os.environ.get("SHOAL_CRASH_SEED", "1"))
IS_WHOLE = CHANGES >= 500

KINDS = [("lora_xs", 4), ("lora", 3), ("miss", 8), ("foreign_xs", 5), ("compact_xs", 8)]
PROMPTS = [tuple(range(30, 47)), tuple(range(60, 69))]
# What the server is killed at: see `_fuse`.
FUSES = [
    "a record is being written",
    "a change was written",
    "a record was written",
    "some time has passed",
]
NAMES = [[f"{writer}{number}" for number in range(4)] for writer in "ab"]
# Small enough that not everything stays in memory: what is read comes from the store, too.
SIZES = {
    "max-model-len": "64",
    "block-size": "4",
    "max-num-seqs": "8",
    "max-num-batched-tokens": "32",
    "kv-cache-memory": "4MiB",
    "adapter-memory": "128KiB",
    "host-adapter-memory": "256KiB",
    "spectral-memory": "0",
    "basis-rank": "16",
}
FLAGS = ["--device=cpu", "--dtype=float32", "--no-shipped-adapters", "--served-model-name=base"]
FLAGS += [f"--{name}={size}" for name, size in SIZES.items()]


def materials(tiny: Any, make_adapter: Callable[..., Any], count: int) -> list[Material]:
    """Adapters of which no two answer alike, nor like the base."""
    made: list[Material] = []
    for seed in range(count):
        kind, rank = KINDS[seed % len(KINDS)]
        # All of the kind that brings its own basis share one: few are kept.
        adapter = make_adapter(kind, rank, 3 if kind == "foreign_xs" else seed)
        if kind == "foreign_xs" and seed > len(KINDS):
            continue
        answers = {p: tiny.greedy(p, ANSWER_TOKENS, adapter.deltas) for p in PROMPTS}
        made.append(Material(adapter.files, answers))
    for prompt in PROMPTS:
        answers = [tiny.greedy(prompt, ANSWER_TOKENS), *(m.answers[prompt] for m in made)]
        assert len({tuple(answer) for answer in answers}) == len(answers)
    return made


@pytest.mark.timeout(3600 if IS_WHOLE else 300)
@pytest.mark.parametrize(
    "kind",
    [
        "sqlite",
        pytest.param(
            "postgresql",
            marks=pytest.mark.skipif(not IS_WHOLE, reason="only the whole test takes the time"),
        ),
    ],
)
def test_kill_9_loses_nothing_that_was_acknowledged_and_serves_nothing_else(
    kind: str,
    request: pytest.FixtureRequest,
    forge: Forge,
    tiny: Any,
    make_adapter: Any,
    tmp_path: Path,
) -> None:
    url = f"sqlite:///{tmp_path}/registry.db"
    if kind == "postgresql":
        url = request.getfixturevalue("postgres").new_database()[1]
    store_url = f"{tmp_path}/store"
    place = (f"--registry={url}", f"--store={store_url}")
    world = World(materials(tiny, make_adapter, 15 if IS_WHOLE else 9), NAMES)
    rng = random.Random(SEED)
    cut_off = 0
    began = time.monotonic()
    for life in range(KILLS + 1):
        server = forge.start(*FLAGS, *place)
        settle(world, server.url)
        left = CHANGES - sum(world.changes.values())
        share = CHANGES / (KILLS + 1) * rng.uniform(0.6, 1.1)
        is_last = life == KILLS
        visit = Visit(
            world,
            server,
            changes=max(1, left if is_last else round(share)),
            fuse=None if is_last else _fuse(FUSES[life % len(FUSES)], rng, tmp_path),
            seed=SEED * 1000 + life,
        )
        visit.run()
        cut_off += visit.unanswered
        if is_last:
            server.kill()
        assert forge.bury(server) == signal.SIGKILL
        log = server.log.read_text()
        assert "Traceback" not in log, log
        assert " ERROR " not in log, log
        # Before some restarts everything is cleared away that may be.
        if is_last or rng.random() < 0.5:
            _clear(url, store_url)
    server = forge.start(*FLAGS, *place)
    settle(world, server.url)
    server.kill()
    forge.bury(server)
    print(
        f"\n{kind}: seed {SEED}, {world.changes}, {KILLS} kills, {cut_off} changes cut off, "
        f"reads {world.reads}, {time.monotonic() - began:.0f} s"
    )
    assert sum(world.changes.values()) >= CHANGES
    assert min(world.changes.values()) > 0
    assert world.reads["served"] > CHANGES / 8


def _fuse(kind: str, rng: random.Random, folder: Path) -> Callable[[], None]:
    """Burns until a while has passed, or until just after something was written."""
    looks: dict[str, Callable[[], object]] = {
        "a record is being written": lambda: os.listdir(folder / "store/temporary"),
        "a record was written": lambda: sorted((folder / "store/records").glob("*/*/*")),
        "a change was written": lambda: _size(folder / "registry.db-wal"),
    }
    more_s = rng.uniform(0.0, rng.choice([0.0, 0.002, 0.01]))
    if kind not in looks:
        more_s = rng.uniform(0.0, rng.choice([0.005, 0.03, 0.1, 0.3]))

    def burn() -> None:
        if kind in looks:
            look, until = looks[kind], time.monotonic() + 1.0
            before = look()
            while look() == before and time.monotonic() < until:
                pass
        time.sleep(more_s)

    return burn


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _clear(url: str, store_url: str) -> None:
    """Collect and repair with no grace, as nobody uses it; then there is nothing but what must."""
    registry = Registry.open(url, store_url, base_digest="0" * 64)
    registry.check()
    registry.collect(grace_s=0.0)
    registry.close()
    place = [f"--registry={url}", f"--store={store_url}"]
    assert main(["doctor", *place, "--repair", "--grace-hours=0"]) == 0
    assert main(["doctor", *place]) == 0
    database = Database(url)
    with database.read() as connection:
        wanted = set(connection.execute(select(VERSIONS.c.digest)).scalars())
        assert not connection.execute(select(GARBAGE.c.digest)).all()
    database.close()
    assert {digest for digest, _ in open_store(store_url).records()} == wanted
    bases = places(url, store_url).bases
    left = [p for p in Path(store_url).rglob("*") if p.is_file() and bases not in p.parents]
    assert {path.name for path in left} == wanted, "files of writers that died"
