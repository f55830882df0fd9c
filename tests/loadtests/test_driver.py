"""The clock of the offline benchmarks: looking ahead changes no token, and no time is lost."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from shoal.adapters.slots import SlotTable
from shoal.adapters.spec import AdapterSpec, RowAdapter, Slot
from shoal.loadtests.driver import Bench, Case, Driver, RunFailed
from shoal.server.engine.plan import AdapterLoad, StepPlan
from shoal.server.engine.scheduler import Scheduler, SchedulerLimits
from shoal.server.model.fake import FakeRunner

BLOCK = 4


class FakeEngine:
    """What ``Bench`` asks of an engine, on integers."""

    def __init__(self, lookahead: bool, seqs: int = 8, tokens: int = 64) -> None:
        self.plans: list[StepPlan] = []
        runner = FakeRunner(1000, BLOCK, lookahead=lookahead, before_step=self.plans.append)
        self.base_runner = self.runner = runner
        self.config = SimpleNamespace(max_num_seqs=seqs, max_num_batched_tokens=tokens)
        self.model = SimpleNamespace(vocab_size=1000)
        self.adapters = tuple(AdapterSpec(f"{i:064x}", "fold", 1, None, 1) for i in range(30))

    def scheduler(self, *, adapters: bool) -> Scheduler:
        limits = SchedulerLimits(
            block_tokens=BLOCK,
            num_blocks=1000,
            max_num_seqs=self.config.max_num_seqs,
            max_num_batched_tokens=self.config.max_num_batched_tokens,
            max_model_len=500,
            max_waiting=100,
        )
        return Scheduler(limits, SlotTable(100, 1), frozenset())

    def synchronize(self) -> None:
        pass


def bench(engine: FakeEngine) -> Bench:
    return Bench(cast(Any, engine), seed=1)


def shapes(plans: list[StepPlan]) -> set[tuple[int, int]]:
    return {(len(plan.rows), plan.num_tokens) for plan in plans}


@pytest.mark.parametrize("adapters", [0, 3])
def test_looking_ahead_changes_no_token(adapters: int) -> None:
    case = Case(6, 20, 9)
    outcomes = [bench(FakeEngine(ahead)).outcome(case, adapters) for ahead in (False, True)]
    assert outcomes[0].tokens == outcomes[1].tokens
    assert outcomes[0].output_tokens == 6 * 9


def test_the_steps_times_add_up_to_the_runs() -> None:
    outcome = bench(FakeEngine(lookahead=True)).outcome(Case(8, 30, 50), 0)
    assert sum(step.total_s for step in outcome.steps) == pytest.approx(outcome.wall_s, rel=0.05)
    figures = outcome.figures()
    assert figures["decode_rows"] == 8
    assert figures["host_ms"] > 0.0


def test_a_step_counts_the_positions_that_its_rows_see() -> None:
    outcome = bench(FakeEngine(lookahead=True)).outcome(Case(3, 10, 4), 0)
    assert [step.positions for step in outcome.steps] == [3 * 10, 3 * 11, 3 * 12, 3 * 13]
    assert outcome.figures()["decode_positions"] == 3 * 12


@pytest.mark.parametrize("case", [Case(8, 30, 60), Case(5, 7, 40), Case(8, 30, 3)], ids=str)
def test_the_warm_up_takes_every_kind_of_step_that_the_run_takes(case: Case) -> None:
    engine = FakeEngine(lookahead=True)
    bench(engine).warm_up(case, 2)
    warm = shapes(engine.plans)
    warm_steps = len(engine.plans)
    engine.plans.clear()
    bench(engine).outcome(case, 2)
    assert shapes(engine.plans) == warm
    assert len(engine.plans) >= warm_steps


def test_adapters_are_spread_over_the_residents_and_neighbours_differ() -> None:
    engine = FakeEngine(lookahead=False)
    bench(engine).outcome(Case(6, 5, 2), 3)
    digests = {row.request_id: row.adapter for row in engine.plans[0].rows}
    used = [cast(Any, digests[str(i)]).spec.digest for i in range(6)]
    assert used == [engine.adapters[i].digest for i in (0, 10, 20, 0, 10, 20)]


def test_loads_go_to_the_runner_and_the_scheduler_gets_its_plan_back() -> None:
    engine = FakeEngine(lookahead=True)
    load = AdapterLoad(adapter=RowAdapter(engine.adapters[0], Slot(7, 1)))
    waiting = [load]

    def loads() -> tuple[AdapterLoad, ...]:
        return (waiting.pop(),) if waiting else ()

    outcome = bench(engine).outcome(Case(2, 5, 3), 0, loads=loads)
    assert [plan.adapter_loads for plan in engine.plans] == [(load,), (), ()]
    assert outcome.output_tokens == 6


def test_what_is_aborted_leaves_nothing_pinned() -> None:
    engine = FakeEngine(lookahead=True)
    scheduler = engine.scheduler(adapters=True)
    driver = Driver(scheduler, engine.runner)
    driver.add(bench(engine)._requests(Case(4, 10, 20), 4))
    driver.step()
    driver.step()
    driver.abort()
    scheduler.check()
    assert not scheduler.has_work
    assert scheduler.stats().kv_blocks_used == 0


def test_a_failing_request_is_an_error() -> None:
    engine = FakeEngine(lookahead=True)
    engine.runner.before_step = lambda plan: None
    engine.runner._choose = lambda *_: None  # type: ignore[assignment, method-assign, return-value]
    with pytest.raises(RunFailed, match="failed"):
        bench(engine).outcome(Case(2, 5, 3), 0)
