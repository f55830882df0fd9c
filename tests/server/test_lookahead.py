"""Adapters of queued requests are copied early, in bounds, and at nobody's cost."""

from random import Random

import pytest

from shoal.adapters.slots import SlotTable
from shoal.adapters.spec import AdapterSpec
from shoal.server.engine import lookahead
from shoal.server.engine.lookahead import ELEMENTS_A_STEP, LOOK_MAX, LOOK_OF_ONE
from shoal.server.engine.plan import AdapterLoad, StepPlan, StepResult
from shoal.server.engine.request import Request, SamplingParams
from shoal.server.engine.scheduler import Scheduler, SchedulerLimits
from shoal.server.errors import EngineFailure

UNIT = 10


def spec(digest: str, units: int = 1, unit: int = UNIT) -> AdapterSpec:
    return AdapterSpec(digest, "core", 4, None, packed_elements=units * unit)


def make(slots: SlotTable, lanes: int = 1) -> Scheduler:
    limits = SchedulerLimits(
        block_tokens=4,
        num_blocks=1000,
        max_num_seqs=lanes,
        max_num_batched_tokens=64,
        max_model_len=200,
        max_waiting=1000,
    )
    return Scheduler(limits, slots, frozenset())


def add(
    engine: Scheduler,
    name: str,
    adapter: AdapterSpec | None = None,
    output: int = 4,
    tenant: str = "",
) -> None:
    first = 10 + sum(map(ord, name))
    params = SamplingParams(max_tokens=output)
    request = Request(
        id=name, prompt_ids=(first, 1, 2), sampling=params, adapter=adapter, tenant=tenant
    )
    assert engine.add(request) is None


def step(engine: Scheduler) -> StepPlan:
    plan = engine.plan()
    assert plan is not None
    engine.check()
    tokens = {row.request_id: 1 for row in plan.rows if row.sample}
    engine.commit(plan, StepResult(token_ids=tokens))
    engine.check()
    return plan


def digests(loads: tuple[AdapterLoad, ...]) -> list[str]:
    return [load.adapter.spec.digest for load in loads]


def test_what_waits_is_copied_before_its_turn() -> None:
    engine = make(SlotTable(8, UNIT))
    add(engine, "runs")
    add(engine, "next", spec("x"))
    plans = [step(engine) for _ in range(8)]
    assert digests(plans[0].prefetches) == ["x"]
    assert all(not plan.prefetches for plan in plans[1:])
    assert all(not plan.adapter_loads for plan in plans), "it is there when its turn comes"
    (place,) = {plan.rows[0].adapter for plan in plans if plan.rows[0].adapter is not None}
    assert place == plans[0].prefetches[0].adapter


def test_nobody_waits_and_nothing_is_held() -> None:
    slots = SlotTable(8, UNIT)
    engine = make(slots)
    add(engine, "runs")
    for index in range(3):
        add(engine, f"w{index}", spec(f"x{index}"))
    step(engine)
    assert slots.num_pinned == 3
    for index in range(3):
        engine.abort(f"w{index}")
        engine.check()
    assert slots.num_pinned == 0
    assert slots.num_resident == 3, "they stay until their places are needed"


def test_half_of_the_bank_is_held_at_most() -> None:
    slots = SlotTable(8, UNIT)
    engine = make(slots)
    add(engine, "runs")
    for index in range(8):
        add(engine, f"w{index}", spec(f"x{index}"), tenant=str(index))
    assert digests(step(engine).prefetches) == ["x0", "x1", "x2", "x3"]
    assert not step(engine).prefetches


def test_one_tenants_queue_does_not_take_all_the_looks() -> None:
    engine = make(SlotTable(1000, UNIT))
    add(engine, "runs")
    for tenant in "ab":
        for index in range(LOOK_MAX):
            add(engine, f"{tenant}{index}", spec(f"{tenant}{index}"), tenant=tenant)
    found = digests(step(engine).prefetches)
    assert found == [f"{tenant}{index}" for tenant in "ab" for index in range(LOOK_OF_ONE)]


def test_a_step_carries_a_bounded_part_of_what_is_to_be_copied() -> None:
    unit = ELEMENTS_A_STEP // 2
    engine = make(SlotTable(100, unit))
    add(engine, "runs", output=20)
    sizes = {"small": 1, "half": 1, "large": 6, "last": 1}
    for tenant, (name, units) in enumerate(sizes.items()):
        add(engine, name, spec(name, units, unit), tenant=str(tenant))
    plans = [step(engine) for _ in range(4)]
    assert [digests(plan.prefetches) for plan in plans] == [
        ["small", "half"],
        ["large"],  # alone
        ["last"],
        [],
    ]


def test_who_starts_takes_the_room_of_what_is_only_held() -> None:
    slots = SlotTable(4, UNIT)
    engine = make(slots, lanes=2)
    add(engine, "runs", spec("r"), output=30, tenant="a")
    add(engine, "short", output=2, tenant="a")
    for index in range(2):
        add(engine, f"w{index}", spec(f"x{index}"), tenant="a", output=30)
    assert digests(step(engine).prefetches) == ["x0", "x1"]
    add(engine, "wide", spec("wide", 2), tenant="b")
    assert not step(engine).adapter_loads, "the lanes are taken; the other tenant is charged for it"
    plan = step(engine)
    assert digests(plan.adapter_loads) == ["wide"]
    assert slots.resident("x0"), "what is needed last went first"
    assert not slots.resident("x1")


def test_a_prefetch_that_failed_is_made_again() -> None:
    engine = make(SlotTable(4, UNIT))
    add(engine, "runs")
    add(engine, "next", spec("x"))
    plan = engine.plan()
    assert plan is not None
    assert digests(plan.prefetches) == ["x"]
    engine.fail(plan, EngineFailure("planted"))
    engine.check()
    plan = step(engine)
    assert [row.request_id for row in plan.rows] == ["next"]
    assert digests(plan.adapter_loads) == ["x"]


def scan(hot: int, cold: int, units: int, seed: int) -> tuple[int, int]:
    """Hot adapters in turns beside a scan of cold ones; loads of hot ones, then of cold ones."""
    rng = Random(seed)
    engine = make(SlotTable(units, UNIT), lanes=4)
    seen: list[str] = []
    names = [f"hot{index % hot}" for index in range(4 * hot)]
    for index in range(cold):
        names += [f"cold{index}", f"hot{rng.randrange(hot)}"]
    for index, name in enumerate(names):
        add(engine, str(index), spec(name), output=2)
        if engine.num_waiting > 8:
            plan = step(engine)
            if index > 4 * hot:
                seen += digests(plan.adapter_loads) + digests(plan.prefetches)
    while engine.has_work:
        plan = step(engine)
        seen += digests(plan.adapter_loads) + digests(plan.prefetches)
    hot_loads = sum(name.startswith("hot") for name in seen)
    return hot_loads, len(seen) - hot_loads


@pytest.mark.parametrize("seed", range(3))
def test_a_scan_of_cold_adapters_does_not_flush_hot_ones(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hot, cold = scan(hot=10, cold=400, units=32, seed=seed)
    assert cold >= 400
    assert hot <= 20, "of 400 uses"
    monkeypatch.setattr(lookahead, "LOOK_MAX", 0)
    without, _ = scan(hot=10, cold=400, units=32, seed=seed)
    assert hot <= without + 10


@pytest.mark.parametrize("seed", range(20))
def test_what_runs_is_never_evicted_and_little_is_copied_twice(seed: int) -> None:
    """Random sizes, tenants and aborts, with two plans under way."""
    rng = Random(seed)
    slots = SlotTable(rng.choice((4, 9, 30)), UNIT)
    engine = make(slots, lanes=rng.choice((1, 3, 8)))
    under_way: list[StepPlan] = []
    bank: dict[str, tuple[int, int]] = {}
    loads = starts = 0
    for index in range(300):
        if index < 250 and rng.random() < 0.7:
            name = f"x{min(rng.randrange(30), rng.randrange(30))}"
            units = 1 + sum(map(ord, name)) % 3
            tenant = rng.choice("abc")
            add(engine, str(index), spec(name, units), output=rng.randint(1, 6), tenant=tenant)
            if rng.random() < 0.1:
                engine.abort(str(rng.randrange(index + 1)))
        while len(under_way) < 2 and (plan := engine.plan()) is not None:
            engine.check()
            used = {
                row.adapter.spec.digest: row.adapter.slot
                for other in (*under_way, plan)
                for row in other.rows
                if row.adapter is not None
            }
            for load in (*plan.adapter_loads, *plan.prefetches):
                slot, digest = load.adapter.slot, load.adapter.spec.digest
                low, high = slot.unit, slot.unit + slot.num_units
                for user, place in used.items():
                    apart = place.unit + place.num_units <= low or place.unit >= high
                    assert user == digest or apart, "replaced while it is used"
                bank = {d: e for d, e in bank.items() if e[1] <= low or e[0] >= high}
                bank[digest] = low, high
                loads += 1
            for row in plan.rows:
                if row.adapter is not None:
                    slot = row.adapter.slot
                    assert bank[row.adapter.spec.digest] == (slot.unit, slot.unit + slot.num_units)
                    starts += row.start == 0
            under_way.append(plan)
        if under_way:
            plan = under_way.pop(0)
            tokens = {row.request_id: 1 for row in plan.rows if row.sample}
            engine.commit(plan, StepResult(token_ids=tokens))
            engine.check()
    assert loads <= 1.3 * starts + LOOK_MAX, "copied again and again"
