"""How long a registry takes to answer: random look-ups, pages, records, cold loads.

Reads what is there and changes nothing, but in a catalog that ``dummy_catalog`` filled.
"""

import hashlib
import random
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from sqlalchemy import func, select

from shoal.adapters.base import base_digest
from shoal.adapters.errors import AdapterError
from shoal.adapters.host_tier import HostTier
from shoal.adapters.layouts import Layouts
from shoal.adapters.packing import pack_adapter
from shoal.adapters.record import from_record
from shoal.adapters.registry.catalog import AdapterInfo, Catalog, Content
from shoal.adapters.registry.database import Database
from shoal.adapters.registry.errors import RegistryError
from shoal.adapters.registry.store import Store, open_store
from shoal.adapters.registry.tables import ADAPTERS, SHARES, TOTALS
from shoal.adapters.spec import BaseShape
from shoal.server.dummy_catalog import BASE, OWNER, READER, fill, is_filled
from shoal.server.model.config import ModelError
from shoal.server.model.pull import resolve_model
from shoal.server.model.weights import read_config

WARM_UP = 50
# Pages and writes are asked for so much less often than look-ups.
_FEW = 10


@dataclass(frozen=True, slots=True)
class Times:
    """Milliseconds of so many calls."""

    calls: int
    p50_ms: float
    p99_ms: float
    max_ms: float


@dataclass(frozen=True, slots=True)
class Asked:
    """What to measure.

    Attributes:
        lookups: calls of each kind; of pages and writes a tenth.
        threads: that call at the same time, each its share.
        seed: of the names that are asked for.
        model: the base, as ``shoal serve`` takes it, to measure cold loads; None leaves them out.
    """

    lookups: int = 5000
    threads: int = 1
    seed: int = 0
    model: str | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """What was measured.

    Attributes:
        backend: ``sqlite`` or ``postgresql``.
        adapters: of the owner and base whose names were asked for.
        opened_s: for catalog and store, with every pack's index.
        times: by what was called.
    """

    backend: str
    adapters: int
    opened_s: float
    times: dict[str, Times]


def measure_registry(registry_url: str, store_url: str, asked: Asked, fill_with: int = 0) -> Result:
    """Measure a registry by the owner and base that have the most adapters there.

    Args:
        registry_url, store_url: as ``Registry.open`` takes them.
        fill_with: put so many names without bytes into it first.

    Raises:
        ValueError: it has no adapters, or is to be filled and has some, or cannot be used.
    """
    try:
        begin = time.perf_counter()
        database = Database(registry_url)
        try:
            store = open_store(store_url)
            opened_s = time.perf_counter() - begin
            if fill_with:
                fill(database, fill_with)
            adapters, times = _measured(database, store, asked)
            return Result(database.backend, adapters, opened_s, times)
        finally:
            database.close()
    except (AdapterError, ModelError, RegistryError, OSError) as problem:
        raise ValueError(str(problem)) from problem


def _measured(database: Database, store: Store, asked: Asked) -> tuple[int, dict[str, Times]]:
    with database.read() as connection:
        query = select(TOTALS).order_by(TOTALS.c.names.desc(), TOTALS.c.owner).limit(1)
        most = connection.execute(query).one_or_none()
    if most is None or most.names == 0:
        raise ValueError("the registry has no adapters")
    catalog = Catalog(database, base_digest=most.base_digest, owner=most.owner)
    names = _names(database, most.owner, most.base_digest, asked)
    few = max(asked.lookups // _FEW, 1)

    def timed(call: Callable[[str], object], times: int, of: list[str] = names) -> Times:
        return _timed(call, [of[n % len(of)] for n in range(times + WARM_UP)], asked.threads)

    found = {
        "look-up": timed(catalog.get, asked.lookups),
        "page of 100": timed(lambda name: catalog.page(limit=100, after=name), few),
        "page of 100 by prefix": timed(lambda name: catalog.page(limit=100, prefix=name[:-2]), few),
        "count": timed(lambda _: catalog.count(), few),
    }
    if is_filled(database):
        found |= _filled(database, catalog, asked, few)
    else:
        known = [catalog.get(name) for name in names[: 2 * (few + WARM_UP)]]
        infos = {info.name: info for info in known}
        drawn = list(infos)
        found["record from the store"] = timed(
            lambda name: store.get(infos[name].digest), min(few, len(drawn)), drawn
        )
        if asked.model is not None:
            load = _loader(store, asked.model, most.base_digest)
            rest = drawn[few + WARM_UP :] or drawn  # not read before
            found["cold load"] = timed(lambda name: load(infos[name]), min(few, len(rest)), rest)
    return int(most.names), found


def _names(database: Database, owner: str, base: str, asked: Asked) -> list[str]:
    """As many as there will be look-ups, drawn by id: nearly uniform, without reading them all."""
    live = (
        ADAPTERS.c.owner == owner,
        ADAPTERS.c.base_digest == base,
        ADAPTERS.c.deleted_at.is_(None),
    )
    rng = random.Random(asked.seed)
    with database.read() as connection:
        query = select(func.min(ADAPTERS.c.id), func.max(ADAPTERS.c.id))
        first, last = connection.execute(query).one()
        found: list[str] = []
        while len(found) < asked.lookups + WARM_UP:
            some = [rng.randint(first, last) for _ in range(500)]
            rows = connection.execute(
                select(ADAPTERS.c.name).where(ADAPTERS.c.id.in_(some), *live)
            ).scalars()
            found += rows
            if not found:  # nearly all are somebody else's
                found += connection.execute(
                    select(ADAPTERS.c.name).where(*live).limit(1000)
                ).scalars()
    rng.shuffle(found)
    return found


def _filled(database: Database, catalog: Catalog, asked: Asked, few: int) -> dict[str, Times]:
    """What may be measured where nothing is real."""
    reader = Catalog(database, base_digest=BASE, owner=READER)
    with database.read() as connection:
        query = select(SHARES.c.name).where(SHARES.c.owner == OWNER).limit(200_000)
        shared = [f"{OWNER}/{name}" for name in connection.execute(query).scalars()]
    random.Random(asked.seed).shuffle(shared)
    prefix = uuid.uuid4().hex[:8]
    new = [f"new-{prefix}-{n}" for n in range(few + WARM_UP)]

    def publish(name: str) -> None:
        digest = hashlib.sha256(name.encode()).hexdigest()
        catalog.publish(name, Content(digest, "core", "lora_xs", 4, 7000, 3360, None), created=0.0)

    def timed(call: Callable[[str], object], names: list[str]) -> Times:
        return _timed(call, names, asked.threads)

    return {
        "look-up of a shared one": timed(reader.get, shared[: asked.lookups + WARM_UP]),
        "page of 100 shared": timed(
            lambda name: reader.shared_page(limit=100, after=name), shared[: few + WARM_UP]
        ),
        "publish": timed(publish, new),
        "tag": timed(lambda name: catalog.tag(name, {"a": "b"}), new),
    }


def _loader(store: Store, model: str, base: str) -> Callable[[AdapterInfo], None]:
    """What a server does for an adapter that is only in the store, up to the host tier."""
    path = resolve_model(model)
    shape: BaseShape = read_config(path).base_shape(path.stem, base_digest(path))
    if shape.digest != base:
        raise ValueError(f"the registry's adapters are not for {model}, but for base {base}")
    host = HostTier(1 << 30)
    layouts = Layouts(shape, torch.float32)

    def load(info: AdapterInfo) -> None:
        record = store.get(info.digest)
        packed = layouts.pack(record, info.digest)
        if packed is None:
            weights = from_record(record, shape)
            packed = pack_adapter(weights, shape, info.digest, torch.float32)
            layouts.learn(record, weights, packed)
        host.put(packed)

    return load


def _timed(call: Callable[[str], object], names: list[str], threads: int) -> Times:
    """A call for each name; the first ``WARM_UP`` of many are not measured."""
    warm = min(WARM_UP, len(names) // 2)
    for name in names[:warm]:
        call(name)
    measured = names[warm:]

    def some(offset: int) -> list[float]:
        took = []
        for name in measured[offset::threads]:
            start = time.perf_counter()
            call(name)
            took.append(1000 * (time.perf_counter() - start))
        return took

    with ThreadPoolExecutor(threads) as pool:
        took = sorted(each for part in pool.map(some, range(threads)) for each in part)
    return Times(
        calls=len(took),
        p50_ms=round(took[len(took) // 2], 3),
        p99_ms=round(took[int(0.99 * len(took))], 3),
        max_ms=round(took[-1], 3),
    )
