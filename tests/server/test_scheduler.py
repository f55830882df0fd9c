"""The scheduler, one rule a test; ``test_simulation.py`` puts them all together."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from shoal.adapters.slots import SlotTable
from shoal.adapters.spec import AdapterSpec
from shoal.server.engine.plan import UNKNOWN_TOKEN, Pending, StepPlan, StepResult
from shoal.server.engine.request import FinishReason, Request, SamplingParams, TokenEvent
from shoal.server.engine.scheduler import PASSES_MAX, SPREAD_MAX, Scheduler, SchedulerLimits
from shoal.server.errors import (
    DeadlineExceeded,
    EngineFailure,
    InvalidRequest,
    PromptTooLong,
    UnusableAdapter,
)
from shoal.server.model.fake import FakeRunner

EOS = 2
LIMITS = SchedulerLimits(
    block_tokens=4,
    num_blocks=100,
    max_num_seqs=8,
    max_num_batched_tokens=64,
    max_model_len=200,
    max_waiting=100,
    vocab_size=1000,
)


def scheduler(slots: int = 4, **limits: Any) -> Scheduler:
    return Scheduler(replace(LIMITS, **limits), SlotTable(slots, 10), frozenset({EOS}))


def request(
    name: str, prompt: int = 3, adapter: AdapterSpec | None = None, **sampling: Any
) -> Request:
    """A prompt of ``prompt`` tokens, different from any other name's."""
    first = 10 + sum(map(ord, name))
    params = SamplingParams(**{"max_tokens": 4, **sampling})
    ids = tuple((first + 31 * i) % 1000 for i in range(prompt))
    return Request(id=name, prompt_ids=ids, sampling=params, adapter=adapter)


def spec(digest: str, units: int = 1) -> AdapterSpec:
    return AdapterSpec(digest, "core", 4, None, packed_elements=units * 10)


def step(engine: Scheduler, token: int = 500) -> tuple[StepPlan, list[TokenEvent]]:
    """Plan, sample ``token`` for every row that samples, commit."""
    plan = engine.plan()
    assert plan is not None
    engine.check()
    result = StepResult(token_ids={row.request_id: token for row in plan.rows if row.sample})
    events = engine.commit(plan, result)
    engine.check()
    return plan, events


def ahead(engine: Scheduler) -> StepPlan:
    """One more plan under way."""
    plan = engine.plan()
    engine.check()
    assert plan is not None
    return plan


def land(engine: Scheduler, plan: StepPlan, token: int = 500) -> list[TokenEvent]:
    """Commit ``plan`` with ``token`` for every row that samples."""
    result = StepResult(token_ids={row.request_id: token for row in plan.rows if row.sample})
    events = engine.commit(plan, result)
    engine.check()
    return events


def ends(engine: Scheduler) -> dict[str, TokenEvent]:
    """Run to the end; the last event of each request."""
    last = {}
    while engine.has_work:
        for event in step(engine)[1]:
            last[event.request_id] = event
    return last


def names(plan: StepPlan) -> list[str]:
    return [row.request_id for row in plan.rows]


# -- batching -------------------------------------------------------------------------------------


def test_a_prompt_samples_in_its_first_step_and_one_token_a_step_after() -> None:
    engine = scheduler()
    engine.add(request("a", prompt=3))
    plan, events = step(engine)
    (row,) = plan.rows
    assert (row.start, len(row.token_ids), row.sample, row.output_tokens) == (0, 3, True, 0)
    assert events == [TokenEvent(request_id="a", token_ids=(500,))]
    (row,) = step(engine)[0].rows
    assert (row.start, row.token_ids, row.output_tokens) == (3, (500,), 1)


def test_a_long_prompt_is_computed_in_chunks_beside_decoding_rows() -> None:
    engine = scheduler(max_num_batched_tokens=8)
    engine.add(request("short", prompt=3, max_tokens=9))
    step(engine)
    engine.add(request("long", prompt=17))
    rows = [step(engine)[0].rows for _ in range(3)]
    assert [[len(row.token_ids) for row in each] for each in rows] == [[1, 7], [1, 7], [1, 3]]
    assert [each[1].sample for each in rows] == [False, False, True]
    assert [each[1].start for each in rows] == [0, 7, 14]


def prompts_a_step(engine: Scheduler) -> list[list[int]]:
    """Of all steps to the end, the tokens of each row that has more than one."""
    found = []
    while engine.has_work:
        plan, _ = step(engine)
        found.append([len(row.token_ids) for row in plan.rows if len(row.token_ids) > 1])
    return found


def test_a_burst_of_short_prompts_is_spread_over_recorded_steps_while_others_decode() -> None:
    engine = scheduler(max_num_seqs=20, recorded_prompts=(3, 12))
    engine.add(request("stream", max_tokens=9))
    step(engine)
    for name in "abcdefg":
        engine.add(request(name, prompt=4, max_tokens=1))
    assert prompts_a_step(engine)[:4] == [[4, 4, 4], [4, 4, 4], [4], []]


def test_nobody_waits_for_a_recorded_step_that_nobody_else_waits_for() -> None:
    engine = scheduler(max_num_seqs=20, recorded_prompts=(3, 12))
    for name in "abcdefg":
        engine.add(request(name, prompt=4))
    assert prompts_a_step(engine)[0] == [4] * 7


def test_a_queue_is_no_burst_and_starts_as_room_allows() -> None:
    """Else requests of few tokens would come in at so many a step, and most lanes stay empty."""
    engine = scheduler(max_num_seqs=60, max_num_batched_tokens=400, recorded_prompts=(3, 12))
    engine.add(request("stream", max_tokens=9))
    step(engine)
    most = 3 * SPREAD_MAX
    for i in range(most + 1):
        engine.add(request(f"{i}", prompt=4, max_tokens=1))
    assert prompts_a_step(engine)[0] == [4] * (most + 1)
    engine.add(request("stream", max_tokens=9))
    step(engine)
    for i in range(most):
        engine.add(request(f"{i}", prompt=4, max_tokens=1))
    assert prompts_a_step(engine)[:SPREAD_MAX] == [[4, 4, 4]] * SPREAD_MAX


@pytest.mark.parametrize(
    ("stream", "long", "expected"),
    [
        (True, 25, [[19], [6, 2, 2], [2, 2, 2], []]),
        (True, 28, [[19], [9, 2, 2, 2, 2, 2], []]),  # too many tokens for a recorded step anyway
        (False, 26, [[20], [6, 2, 2, 2, 2, 2]]),  # that one is under way makes nobody wait
    ],
)
def test_prompts_under_way_count_among_those_of_a_recorded_step(
    stream: bool, long: int, expected: list[list[int]]
) -> None:
    engine = scheduler(max_num_seqs=20, max_num_batched_tokens=20, recorded_prompts=(3, 12))
    if stream:
        engine.add(request("stream", max_tokens=9))
        step(engine)
    engine.add(request("long", prompt=long, max_tokens=1))
    for name in "abcde":
        engine.add(request(name, prompt=2, max_tokens=1))
    assert prompts_a_step(engine)[: len(expected)] == expected


def test_what_is_left_of_a_cached_prompt_counts_and_no_more() -> None:
    engine = scheduler(max_num_seqs=20, recorded_prompts=(3, 12))
    engine.add(request("same", prompt=22, max_tokens=1))
    step(engine)
    engine.add(request("stream", max_tokens=9))
    step(engine)
    for name in "abcd":
        engine.add(replace(request("same", prompt=22, max_tokens=1), id=name))
    assert prompts_a_step(engine)[:2] == [[2, 2, 2], [2]]


def test_longer_prompts_are_not_spread() -> None:
    """Their step has no recording anyway, and keeps the device busy while it is launched."""
    engine = scheduler(max_num_seqs=20, recorded_prompts=(3, 12))
    engine.add(request("stream", max_tokens=9))
    step(engine)
    for name in "abcde":
        engine.add(request(name, prompt=5, max_tokens=1))
    assert prompts_a_step(engine)[0] == [5] * 5


def test_prompts_of_one_token_are_rows_like_those_that_decode() -> None:
    engine = scheduler(max_num_seqs=20, recorded_prompts=(2, 12))
    for name in "abcdef":
        engine.add(request(name, prompt=1, max_tokens=1))
    assert len(step(engine)[0].rows) == 6
    for name in "abcdef":
        engine.add(request(name, prompt=1 if name < "d" else 4, max_tokens=1))
    assert prompts_a_step(engine) == [[4, 4], [4]]


def test_row_blocks_cover_exactly_its_positions() -> None:
    engine = scheduler(max_num_batched_tokens=8)
    engine.add(request("a", prompt=17))
    assert [len(step(engine)[0].rows[0].block_ids) for _ in range(4)] == [2, 4, 5, 5]


def test_no_more_rows_than_max_num_seqs() -> None:
    engine = scheduler(max_num_seqs=2)
    for name in "abc":
        engine.add(request(name))
    plan, _ = step(engine)
    assert names(plan) == ["a", "b"]
    assert (engine.num_running, engine.num_waiting) == (2, 1)


def test_one_token_rows_come_first_and_an_adapters_rows_are_neighbours() -> None:
    engine = scheduler()
    for name, adapter in (("a", "x"), ("b", None), ("c", "y"), ("d", "x")):
        engine.add(request(name, adapter=spec(adapter) if adapter else None, max_tokens=9))
    assert names(step(engine)[0]) == ["b", "a", "d", "c"]
    engine.add(request("e", prompt=5, adapter=spec("y")))
    engine.add(request("f", prompt=5))
    assert names(step(engine)[0]) == ["b", "a", "d", "c", "f", "e"]


def test_nothing_to_do_plans_nothing() -> None:
    engine = scheduler()
    assert engine.plan() is None
    assert not engine.has_work


# -- what a row is told ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "penalty", [{"presence_penalty": 0.5}, {"frequency_penalty": -1.0}, {"repetition_penalty": 1.1}]
)
def test_penalised_rows_get_the_history(penalty: dict[str, Any]) -> None:
    engine = scheduler()
    asked = request("a", prompt=3, **penalty)
    engine.add(asked)
    step(engine)
    (row,) = step(engine)[0].rows
    assert row.history_ids == (*asked.prompt_ids, 500)
    assert row.prompt_tokens == 3


def test_rows_without_penalties_carry_no_history() -> None:
    engine = scheduler()
    engine.add(request("a", seed=1))
    (row,) = step(engine)[0].rows
    assert row.history_ids == ()


def test_ends_are_suppressed_until_min_tokens_exist() -> None:
    engine = scheduler()
    engine.add(request("a", min_tokens=2, stop_token_ids=frozenset({7})))
    suppressed = [step(engine)[0].rows[0].suppressed_ids for _ in range(4)]
    assert suppressed == [(EOS, 7), (EOS, 7), (), ()]


def test_a_prompt_chunk_that_does_not_sample_suppresses_nothing() -> None:
    engine = scheduler(max_num_batched_tokens=8)
    engine.add(request("a", prompt=9, min_tokens=2))
    assert step(engine)[0].rows[0].suppressed_ids == ()


# -- ending ---------------------------------------------------------------------------------------


def tokens_until_end(engine: Scheduler, token: int) -> tuple[int, FinishReason | None]:
    count = 0
    while engine.has_work:
        for event in step(engine, token)[1]:
            count += len(event.token_ids)
            reason = event.finish_reason
    return count, reason


@pytest.mark.parametrize(
    ("sampling", "token", "ended"),
    [
        ({}, 500, (4, FinishReason.LENGTH)),
        ({}, EOS, (1, FinishReason.STOP)),
        ({"ignore_eos": True}, EOS, (4, FinishReason.LENGTH)),
        ({"stop_token_ids": frozenset({7})}, 7, (1, FinishReason.STOP)),
        ({"stop_token_ids": frozenset({7}), "ignore_eos": True}, 7, (1, FinishReason.STOP)),
        ({"min_tokens": 2}, EOS, (3, FinishReason.STOP)),
        ({"max_tokens": 1}, EOS, (1, FinishReason.STOP)),
        ({"max_tokens": 1000}, 500, (197, FinishReason.LENGTH)),  # max_model_len 200, prompt 3
    ],
)
def test_finish_rules(
    sampling: dict[str, Any], token: int, ended: tuple[int, FinishReason]
) -> None:
    engine = scheduler()
    engine.add(request("a", **sampling))
    assert tokens_until_end(engine, token) == ended


def test_a_request_alone_may_fill_the_whole_pool() -> None:
    engine = scheduler(num_blocks=2)
    engine.add(request("a", prompt=3, max_tokens=100))
    assert tokens_until_end(engine, 500) == (6, FinishReason.LENGTH)  # 8 positions, and one more


def test_the_longest_prompt_that_fits_gets_one_token() -> None:
    engine = scheduler(num_blocks=2)
    assert engine.add(request("a", prompt=8)) is None
    assert tokens_until_end(engine, 500) == (1, FinishReason.LENGTH)


@pytest.mark.parametrize("limits", [{"num_blocks": 2}, {"max_model_len": 9}])
def test_a_prompt_that_can_never_fit_ends_with_prompt_too_long(limits: dict[str, int]) -> None:
    engine = scheduler(**limits)
    event = engine.add(request("a", prompt=9))
    assert event is not None
    assert isinstance(event.error, PromptTooLong)
    assert "9 tokens" in str(event.error)
    assert not engine.has_work


def test_an_adapter_larger_than_the_bank_ends_with_unusable_adapter() -> None:
    engine = scheduler(slots=2)
    event = engine.add(request("a", adapter=spec("x", units=3)))
    assert event is not None
    assert isinstance(event.error, UnusableAdapter)
    assert not engine.has_work


@pytest.mark.parametrize("ids", [(), (1000,), (-1,), (5, 1000, 5)])
def test_a_prompt_the_model_cannot_read_never_reaches_a_step(ids: tuple[int, ...]) -> None:
    engine = scheduler()
    event = engine.add(replace(request("a"), prompt_ids=ids))
    assert event is not None
    assert isinstance(event.error, InvalidRequest)
    assert not engine.has_work


# -- tenants --------------------------------------------------------------------------------------


def of(tenant: str, name: str, **fields: Any) -> Request:
    weight = fields.pop("weight", 1)
    return replace(request(name, **fields), tenant=tenant, weight=weight)


def test_tenants_take_turns_whatever_they_sent_first() -> None:
    engine = scheduler(max_num_seqs=1)
    for index in range(4):
        engine.add(of("a", f"a{index}", max_tokens=1))
    for index in range(2):
        engine.add(of("b", f"b{index}", max_tokens=1))
    started = [names(step(engine)[0])[0] for _ in range(6)]
    assert started == ["a0", "b0", "a1", "b1", "a2", "a3"]


def test_a_weight_is_a_share() -> None:
    engine = scheduler(max_num_seqs=1)
    for index in range(12):
        engine.add(of("a", f"a{index:02}", max_tokens=1, weight=2))
        engine.add(of("b", f"b{index:02}", max_tokens=1))
    started = [names(step(engine)[0])[0][0] for _ in range(12)]
    assert started.count("a") == 8


def test_input_costs_one_and_output_two() -> None:
    engine = scheduler()
    engine.add(of("a", "a", prompt=7, max_tokens=3))
    ends(engine)
    assert engine.service_total == 7 + 2 * 3


def test_tokens_from_the_prefix_cache_are_not_charged() -> None:
    engine = scheduler()
    for name in ("a", "b"):
        engine.add(replace(request("same", prompt=8, max_tokens=1), id=name))
        ends(engine)
    assert engine.service_total == (8 + 2) + (4 + 2)


def test_what_preemption_computes_again_is_not_charged_twice() -> None:
    engine = scheduler(num_blocks=4)
    for name in ("old", "young"):
        engine.add(request(name, prompt=4, max_tokens=9))
    ends(engine)
    assert engine.stats().preemptions_total >= 1
    assert engine.service_total == 2 * (4 + 2 * 9)


def test_a_prompt_short_of_blocks_waits_and_is_not_overtaken_by_other_tenants() -> None:
    engine = scheduler(num_blocks=4)
    engine.add(of("a", "running", prompt=8, max_tokens=2))
    step(engine)
    engine.add(of("b", "large", prompt=12))
    engine.add(of("c", "small", prompt=1))
    assert names(step(engine)[0]) == ["running"]
    assert "large" in names(step(engine)[0])


def test_the_time_in_the_queue_is_told_with_the_first_token() -> None:
    engine = scheduler(max_num_seqs=1)
    for name in ("a", "b"):
        engine.add(replace(request(name, max_tokens=2), arrival_s=10.0))
    told = []
    for now_s in (11.0, 12.0, 13.0, 14.0):
        engine.tick(now_s)
        told += [(event.request_id, event.queue_s) for event in step(engine)[1]]
    assert told == [("a", 1.0), ("a", 0.0), ("b", 3.0), ("b", 0.0)]


# -- deadlines ------------------------------------------------------------------------------------


def test_a_request_that_waits_past_its_deadline_ends_with_an_error() -> None:
    engine = scheduler(max_num_seqs=1)
    engine.add(request("first", max_tokens=9))
    engine.add(replace(request("late"), arrival_s=1.0, deadline_s=1.5))
    step(engine)
    assert engine.tick(1.49) == []
    (event,) = engine.tick(1.5)
    engine.check()
    assert event.request_id == "late"
    assert isinstance(event.error, DeadlineExceeded)
    assert "500 ms" in str(event.error)
    assert engine.tick(99.0) == []
    assert ends(engine).keys() == {"first"}


@pytest.mark.parametrize("steps", [1, 2])
def test_a_running_request_ends_at_its_deadline_with_what_it_has(steps: int) -> None:
    slots = SlotTable(1, 10)
    engine = Scheduler(LIMITS, slots, frozenset())
    engine.add(replace(request("a", max_tokens=50, adapter=spec("x")), deadline_s=5.0))
    step(engine)
    plans = [ahead(engine) for _ in range(steps)]
    (event,) = engine.tick(5.0)
    engine.check()
    assert event == TokenEvent(request_id="a", finish_reason=FinishReason.DEADLINE)
    for plan in plans:
        assert land(engine, plan) == []
    assert (engine.stats().kv_blocks_used, slots.num_pinned) == (0, 0)
    assert not engine.has_work


def test_a_running_request_without_a_token_ends_with_an_error() -> None:
    engine = scheduler(max_num_batched_tokens=8)
    engine.add(replace(request("a", prompt=20), deadline_s=5.0))
    step(engine)
    (event,) = engine.tick(6.0)
    assert isinstance(event.error, DeadlineExceeded)
    assert engine.stats().kv_blocks_used == 0


def test_a_clock_that_goes_back_ends_nobody() -> None:
    engine = scheduler()
    engine.add(replace(request("a", max_tokens=50), deadline_s=5.0))
    step(engine)
    for now_s in (4.0, -1e9, 4.9, 0.0):
        assert engine.tick(now_s) == []
    engine.add(replace(request("b"), arrival_s=-100.0, deadline_s=-90.0))
    assert engine.tick(-91.0) == []  # nor those that came after it went back
    assert [event.request_id for event in engine.tick(-90.0)] == ["b"]
    assert [event.request_id for event in engine.tick(5.0)] == ["a"]


def test_deadlines_of_requests_that_ended_are_forgotten() -> None:
    engine = scheduler()
    for index in range(500):
        engine.add(replace(request(str(index), max_tokens=1), deadline_s=1e9))
        step(engine)
    assert len(engine._deadlines) <= 64


# -- prefix cache ---------------------------------------------------------------------------------


def test_a_repeated_prompt_computes_at_least_one_token() -> None:
    engine = scheduler()
    for name in ("a", "b"):
        engine.add(replace(request("same", prompt=8, max_tokens=1), id=name))
        plan, events = step(engine)
    assert plan.rows[0].start == 4  # not 8: its last block would leave nothing to compute
    assert events[0].cached_tokens == 4
    assert engine.stats().prefix_cache_hits == 4
    assert engine.stats().prefix_cache_queries == 16


def test_cached_tokens_are_reported_once() -> None:
    engine = scheduler()
    for name in ("a", "b"):
        engine.add(replace(request("same", prompt=8), id=name))
        events = [step(engine)[1][0] for _ in range(4)]
    assert [event.cached_tokens for event in events] == [4, 0, 0, 0]


def test_the_cache_of_one_adapter_is_not_anothers() -> None:
    engine = scheduler()
    for name, adapter in (("a", spec("x")), ("b", spec("y")), ("c", None), ("d", spec("x"))):
        engine.add(replace(request("same", prompt=8, max_tokens=1), id=name, adapter=adapter))
        plan, _ = step(engine)
        assert plan.rows[0].start == (4 if name == "d" else 0)


def test_blocks_are_shared_only_after_their_step_is_committed() -> None:
    engine = scheduler()
    first = replace(request("same", prompt=8), id="a")
    engine.add(first)
    engine.add(replace(first, id="b"))
    plan, _ = step(engine)
    assert [row.start for row in plan.rows] == [0, 0]
    assert not {*plan.rows[0].block_ids} & {*plan.rows[1].block_ids}


def test_a_failed_step_caches_nothing() -> None:
    engine = scheduler()
    engine.add(replace(request("same", prompt=8), id="a"))
    plan = engine.plan()
    assert plan is not None
    engine.fail(plan, EngineFailure("planted"))
    engine.add(replace(request("same", prompt=8), id="b"))
    assert step(engine)[0].rows[0].start == 0


def test_generated_tokens_serve_the_next_turn_of_a_chat() -> None:
    engine = scheduler()
    first = request("a", prompt=3, max_tokens=6)
    engine.add(first)
    ends(engine)
    engine.add(replace(first, id="b", prompt_ids=(*first.prompt_ids, *[500] * 6, 1, 1)))
    assert step(engine)[0].rows[0].start == 8


# -- preemption -----------------------------------------------------------------------------------


def test_the_youngest_gives_way_and_finishes_later_with_its_tokens_kept() -> None:
    engine = scheduler(num_blocks=4)
    engine.add(request("old", prompt=4, max_tokens=9))
    engine.add(request("young", prompt=4, max_tokens=9))
    runner = FakeRunner(1000, 4)
    outputs: dict[str, list[int]] = {"old": [], "young": []}
    finished = []
    while (plan := engine.plan()) is not None:
        for event in engine.commit(plan, runner.submit(plan).wait()):
            outputs[event.request_id] += event.token_ids
            if event.finish_reason:
                finished.append(event.request_id)
        engine.check()
    assert finished == ["old", "young"]
    assert engine.stats().preemptions_total >= 1
    for name in outputs:
        assert outputs[name] == runner.expected(request(name, prompt=4).prompt_ids, None, 9)


def test_a_preempted_request_comes_back_before_newcomers() -> None:
    engine = scheduler(num_blocks=4, max_num_seqs=3)
    engine.add(request("old", prompt=4, max_tokens=9))
    engine.add(request("young", prompt=4, max_tokens=9))
    while not engine.stats().preemptions_total:
        step(engine)
    engine.add(request("new", prompt=2, max_tokens=9))
    order = []
    while engine.has_work:
        order += [name for name in names(step(engine)[0]) if name not in order]
    assert order == ["old", "young", "new"]


def test_a_request_short_of_blocks_is_not_overtaken() -> None:
    engine = scheduler(num_blocks=4)
    engine.add(request("running", prompt=8, max_tokens=2))
    step(engine)
    engine.add(request("large", prompt=12))
    engine.add(request("small", prompt=1))
    assert names(step(engine)[0]) == ["running"]


# -- adapters -------------------------------------------------------------------------------------


def test_an_adapter_is_loaded_once_while_it_stays() -> None:
    engine = scheduler()
    engine.add(request("a", adapter=spec("x")))
    assert [load.adapter.spec.digest for load in step(engine)[0].adapter_loads] == ["x"]
    engine.add(request("b", adapter=spec("x")))
    assert step(engine)[0].adapter_loads == ()
    ends(engine)
    engine.add(request("c", adapter=spec("x")))
    assert step(engine)[0].adapter_loads == ()


def test_an_adapter_without_room_does_not_hold_up_the_others() -> None:
    engine = scheduler(slots=1)
    engine.add(request("a", adapter=spec("x")))
    step(engine)
    for name, adapter in (("b", spec("y")), ("c", None), ("d", spec("x")), ("e", spec("z"))):
        engine.add(request(name, adapter=adapter))
    assert sorted(names(step(engine)[0])) == ["a", "c", "d"]


def test_an_adapter_without_room_is_passed_over_a_bounded_number_of_times() -> None:
    engine = scheduler(slots=1)
    engine.add(request("a0", adapter=spec("x")))
    step(engine)
    engine.add(request("starved", adapter=spec("y")))
    started: list[str] = []
    for index in range(1, 500):  # x never runs out of requests
        engine.add(request(f"a{index}", adapter=spec("x")))
        started += [name for name in names(step(engine)[0]) if name not in started]
        if "starved" in started:
            break
    assert started.index("starved") <= PASSES_MAX + 1


def test_a_failed_step_forgets_the_adapters_it_was_to_load() -> None:
    engine = scheduler()
    engine.add(request("a", adapter=spec("x")))
    plan = engine.plan()
    assert plan is not None
    engine.fail(plan, EngineFailure("planted"))
    engine.check()
    engine.add(request("b", adapter=spec("x")))
    assert len(step(engine)[0].adapter_loads) == 1


# -- aborts and failures --------------------------------------------------------------------------


def test_aborting_a_waiting_request_leaves_no_trace() -> None:
    engine = scheduler()
    engine.add(request("a"))
    assert engine.abort("a") == TokenEvent(request_id="a", finish_reason=FinishReason.ABORT)
    assert engine.abort("a") is None
    assert not engine.has_work


def test_aborting_a_running_request_frees_its_blocks_and_slot() -> None:
    slots = SlotTable(1, 10)
    engine = Scheduler(LIMITS, slots, frozenset())
    engine.add(request("a", adapter=spec("x")))
    step(engine)
    engine.abort("a")
    engine.check()
    assert engine.stats().kv_blocks_used == 0
    assert slots.num_pinned == 0


def test_a_request_aborted_under_way_keeps_its_blocks_until_the_step_is_over() -> None:
    slots = SlotTable(1, 10)
    engine = Scheduler(LIMITS, slots, frozenset())
    engine.add(request("a", adapter=spec("x")))
    plan = engine.plan()
    assert plan is not None
    assert engine.abort("a") is not None
    engine.check()
    assert (engine.stats().kv_blocks_used, slots.num_pinned) == (1, 1)
    assert engine.commit(plan, StepResult(token_ids={"a": 5})) == []
    engine.check()
    assert (engine.stats().kv_blocks_used, slots.num_pinned) == (0, 0)


def test_an_id_may_be_used_again_while_the_old_requests_step_is_under_way() -> None:
    engine = scheduler()
    engine.add(request("a"))
    plan = engine.plan()
    assert plan is not None
    engine.abort("a")
    engine.add(request("a"))
    assert engine.commit(plan, StepResult(token_ids={"a": 5})) == []
    engine.check()
    assert ends(engine)["a"].finish_reason is FinishReason.LENGTH


def test_a_failed_step_ends_its_own_requests_only() -> None:
    engine = scheduler(max_num_seqs=1)
    engine.add(request("a"))
    engine.add(request("b"))
    plan = engine.plan()
    assert plan is not None
    (event,) = engine.fail(plan, EngineFailure("planted"))
    assert event.request_id == "a"
    assert isinstance(event.error, EngineFailure)
    assert ends(engine).keys() == {"b"}


@pytest.mark.parametrize(
    "result",
    [StepResult(token_ids={"b": 5}, failed={"a": "not finite"}), StepResult(token_ids={"b": 5})],
    ids=["failed row", "no token"],
)
def test_a_row_without_a_result_ends_alone(result: StepResult) -> None:
    engine = scheduler()
    engine.add(request("a"))
    engine.add(request("b"))
    plan = engine.plan()
    assert plan is not None
    bad, good = engine.commit(plan, result)
    assert isinstance(bad.error, EngineFailure)
    assert good.token_ids == (5,)
    assert engine.num_running == 1


# -- planning ahead -------------------------------------------------------------------------------


def test_a_second_plan_takes_the_token_under_way_for_its_input() -> None:
    engine = scheduler()
    engine.add(request("a", prompt=3, min_tokens=2))
    first, second = ahead(engine), ahead(engine)
    (row,) = second.rows
    assert (row.token_ids, row.start, row.output_tokens) == ((UNKNOWN_TOKEN,), 3, 1)
    assert row.suppressed_ids == (EOS,)
    assert row.lane == first.rows[0].lane
    assert [event.token_ids for event in land(engine, first, 7)] == [(7,)]
    (row,) = ahead(engine).rows
    assert (row.token_ids, row.start, row.output_tokens) == ((UNKNOWN_TOKEN,), 4, 2)
    assert row.suppressed_ids == ()
    assert [event.token_ids for event in land(engine, second, 8)] == [(8,)]


def test_a_prompt_goes_on_where_the_chunk_under_way_ends() -> None:
    engine = scheduler(max_num_batched_tokens=8)
    engine.add(request("a", prompt=13))
    rows = [plan.rows[0] for plan in (ahead(engine), ahead(engine))]
    assert [(row.start, len(row.token_ids), row.sample) for row in rows] == [
        (0, 8, False),
        (8, 5, True),
    ]


def test_two_plans_are_under_way_at_most_and_land_in_their_order() -> None:
    engine = scheduler()
    engine.add(request("a", max_tokens=9))
    ahead(engine)
    second = ahead(engine)
    with pytest.raises(AssertionError, match="too many"):
        engine.plan()
    with pytest.raises(AssertionError, match="order"):
        engine.commit(second, StepResult(token_ids={"a": 5}))


@pytest.mark.parametrize("limits", [{}, {"max_model_len": 5}])
def test_a_request_that_ends_by_length_is_not_planned_beyond_its_end(
    limits: dict[str, int],
) -> None:
    engine = scheduler(**limits)
    engine.add(request("a", prompt=3, max_tokens=99 if limits else 2))
    first, second = ahead(engine), ahead(engine)
    land(engine, first)
    assert engine.plan() is None
    (event,) = land(engine, second)
    assert event.finish_reason is FinishReason.LENGTH
    assert not engine.has_work


def test_a_penalised_request_waits_for_its_token_and_holds_up_nobody() -> None:
    engine = scheduler()
    engine.add(request("plain", max_tokens=9))
    engine.add(request("penalised", max_tokens=9, presence_penalty=1.0))
    first, second = ahead(engine), ahead(engine)
    assert names(second) == ["plain"]
    land(engine, first)
    rows = {row.request_id: row for row in ahead(engine).rows}
    assert rows["plain"].token_ids == (UNKNOWN_TOKEN,)
    assert rows["penalised"].token_ids == (500,)
    assert rows["penalised"].history_ids[-1] == 500


def test_what_a_younger_step_samples_for_an_ended_request_is_dropped() -> None:
    slots = SlotTable(1, 10)
    engine = Scheduler(replace(LIMITS, max_num_seqs=1), slots, frozenset({EOS}))
    engine.add(request("a", adapter=spec("x")))
    first, second = ahead(engine), ahead(engine)
    (event,) = land(engine, first, EOS)
    assert event.finish_reason is FinishReason.STOP
    engine.add(request("b"))
    assert engine.plan() is None  # the lane is taken until the younger step lands
    assert (engine.stats().kv_blocks_used, slots.num_pinned) == (1, 1)
    assert land(engine, second) == []
    assert (engine.stats().kv_blocks_used, slots.num_pinned) == (0, 0)
    assert engine.stats().generation_tokens_total == 1
    assert names(ahead(engine)) == ["b"]


def test_nobody_is_preempted_under_a_step() -> None:
    engine = scheduler(num_blocks=4)
    engine.add(request("old", prompt=7, max_tokens=9))
    engine.add(request("young", prompt=7, max_tokens=9))
    first, second = ahead(engine), ahead(engine)
    land(engine, first)
    assert engine.plan() is None
    assert engine.stats().preemptions_total == 0
    land(engine, second)
    third = ahead(engine)
    assert names(third) == ["old"]
    assert engine.stats().preemptions_total == 1
    land(engine, third)
    assert ends(engine)["young"].finish_reason is FinishReason.LENGTH


def test_a_prompt_under_way_is_not_reused_before_it_has_landed() -> None:
    engine = scheduler()
    plans = []
    for name in ("a", "b"):
        engine.add(replace(request("same", prompt=8, max_tokens=1), id=name))
        plans.append(ahead(engine))
    for plan in plans:
        land(engine, plan)
    engine.add(replace(request("same", prompt=8, max_tokens=1), id="c"))
    plans.append(ahead(engine))
    assert [plan.rows[0].start for plan in plans] == [0, 0, 4]


def test_a_failed_step_ends_its_requests_in_the_younger_one_too() -> None:
    engine = scheduler()
    engine.add(request("a"))
    first = ahead(engine)
    engine.add(request("b"))
    second = ahead(engine)
    assert sorted(names(second)) == ["a", "b"]
    (event,) = engine.fail(first, EngineFailure("planted"))
    engine.check()
    assert event.request_id == "a"
    assert engine.stats().kv_blocks_used == 2  # the younger step may still write there
    assert [event.request_id for event in land(engine, second)] == ["b"]
    assert engine.stats().kv_blocks_used == 1
    assert ends(engine).keys() == {"b"}


def test_the_younger_of_two_steps_may_fail() -> None:
    engine = scheduler()
    engine.add(request("a"))
    first, second = ahead(engine), ahead(engine)
    assert [event.token_ids for event in land(engine, first)] == [(500,)]
    (event,) = engine.fail(second, EngineFailure("planted"))
    engine.check()
    assert isinstance(event.error, EngineFailure)
    assert engine.stats().kv_blocks_used == 0


def test_who_relies_on_a_load_that_failed_ends_and_the_next_loads_again() -> None:
    slots = SlotTable(1, 10)
    engine = Scheduler(LIMITS, slots, frozenset({EOS}))
    engine.add(request("a", adapter=spec("x")))
    first = ahead(engine)
    engine.add(request("b", adapter=spec("x")))
    second = ahead(engine)
    assert second.adapter_loads == ()
    events = engine.fail(first, EngineFailure("planted"))
    engine.check()
    assert [event.request_id for event in events] == ["a", "b"]
    engine.add(request("c", adapter=spec("x")))
    third = ahead(engine)
    assert len(third.adapter_loads) == 1
    assert land(engine, second) == []
    engine.add(request("d", adapter=spec("x")))
    assert ahead(engine).adapter_loads == ()
    land(engine, third)
    assert slots.resident("x")


def test_a_failed_load_is_forgotten_when_the_younger_step_lets_go() -> None:
    slots = SlotTable(1, 10)
    engine = Scheduler(LIMITS, slots, frozenset({EOS}))
    engine.add(request("a", adapter=spec("x")))
    first, second = ahead(engine), ahead(engine)
    engine.fail(first, EngineFailure("planted"))
    engine.check()
    assert slots.resident("x")
    land(engine, second)
    assert not slots.resident("x")


@pytest.mark.parametrize(
    "bad",
    [
        {"num_blocks": 0},
        {"max_num_batched_tokens": 7},
        {"max_model_len": 1},
        {"max_waiting_per_tenant": 0},
        {"max_wait_s": 0},
    ],
)
def test_impossible_limits_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        scheduler(**bad)


def test_every_short_history_keeps_the_invariants() -> None:
    """Three blocks, two slots, three requests with different adapters; all histories of four."""
    operations = ("add", "abort 0", "abort 1", "step", "fail", "abort under way")
    for history in product(operations, repeat=4):
        engine = scheduler(slots=2, num_blocks=3, max_num_seqs=2)
        runner = FakeRunner(1000, 4)
        open_: set[str] = set()
        added = 0
        for operation in ("add", *history, *["step"] * 12):
            if operation == "add" and added < 3:
                engine.add(request(str(added), prompt=4, adapter=spec(str(added), added or 2)))
                open_.add(str(added))
                added += 1
            elif operation in ("abort 0", "abort 1"):
                event = engine.abort(operation[-1])
                assert (event is not None) == (operation[-1] in open_)
                open_.discard(operation[-1])
            elif (plan := engine.plan()) is not None:
                engine.check()
                if operation == "abort under way":
                    name = plan.rows[0].request_id
                    engine.abort(name)
                    open_.remove(name)
                if operation == "fail":
                    events = engine.fail(plan, EngineFailure("planted"))
                else:
                    events = engine.commit(plan, runner.submit(plan).wait())
                for event in events:
                    if event.finish_reason or event.error:
                        open_.remove(event.request_id)
            engine.check()
        while (plan := engine.plan()) is not None:
            for event in engine.commit(plan, runner.submit(plan).wait()):
                if event.finish_reason or event.error:
                    open_.remove(event.request_id)
        assert not open_
        assert engine.stats().kv_blocks_used == 0


def test_every_short_history_keeps_the_invariants_when_planning_ahead() -> None:
    """As above, with two plans under way; what is left at the end lands in turn."""
    operations = ("add", "abort", "plan", "land", "fail")
    for history in product(operations, repeat=4):
        engine = scheduler(slots=2, num_blocks=3, max_num_seqs=2)
        runner = FakeRunner(1000, 4, lookahead=True)
        under_way: list[tuple[StepPlan, Pending]] = []
        open_: list[str] = []
        added = 0
        for operation in ("add", "plan", *history, *["plan", "plan", "land"] * 16):
            events: list[TokenEvent] = []
            if operation == "add" and added < 3:
                engine.add(request(str(added), prompt=4, adapter=spec(str(added), added or 2)))
                open_.append(str(added))
                added += 1
            elif operation == "abort" and open_:
                events = [event] if (event := engine.abort(open_[0])) else []
            elif operation == "plan" and len(under_way) < 2:
                if (plan := engine.plan()) is not None:
                    under_way.append((plan, runner.submit(plan)))
            elif operation in ("land", "fail") and under_way:
                plan, pending = under_way.pop(0)
                result = pending.wait()
                assert not result.failed
                if operation == "fail":
                    events = engine.fail(plan, EngineFailure("planted"))
                else:
                    events = engine.commit(plan, result)
            for event in events:
                if event.finish_reason or event.error:
                    open_.remove(event.request_id)
            engine.check()
        assert not open_
        assert not under_way
        assert engine.stats().kv_blocks_used == 0
