"""Which steps have graphs, and which of those are captured when."""

import random

import pytest

from shoal.adapters.tables import ActiveFamilies
from shoal.server.model import graphs
from shoal.server.model.graphs import (
    CHUNK_TOKENS,
    CHUNKS,
    NO_FAMILIES,
    GraphKey,
    Graphs,
    GraphSizes,
)
from shoal.server.model.step_tensors import Layout

CORE = ActiveFamilies(core_columns=16, core_alignment=8)


def keys(count: int) -> list[GraphKey]:
    return [GraphKey(Layout(rows), True, True, NO_FAMILIES) for rows in range(1, count + 1)]


@pytest.mark.parametrize("most", [1, 5, 64, 100, 256, 300])
def test_a_step_gets_the_smallest_size_that_has_room(most: int) -> None:
    sizes = GraphSizes(most, (True, False))
    captured = {
        key.layout for key in sizes.decode_keys((CORE,)) + sizes.prompt_keys((NO_FAMILIES, CORE))
    }
    rng = random.Random(most)
    for _ in range(2000):
        chunks = rng.choice([0, 0, 1, rng.randint(1, 20)])
        decode = rng.randint(0 if chunks else 1, most)
        used = Layout(decode, chunks, chunks * rng.choice([2, 3, rng.randint(2, 200)]))
        layout = sizes.layout(used, all_sample=True)
        room = [
            each
            for each in captured
            if bool(each.chunks) == bool(chunks)
            and each.decode_rows >= used.decode_rows
            and each.chunks >= used.chunks
            and each.chunk_tokens >= used.chunk_tokens
        ]
        assert layout == min(room, default=None)
        if layout is not None:
            assert layout.rows <= sizes.largest.rows
            assert layout.tokens <= sizes.largest.tokens


def test_rows_that_give_no_token_run_as_beside_prompts() -> None:
    sizes = GraphSizes(8, (True,))
    assert sizes.layout(Layout(3), all_sample=True) == Layout(4)
    assert sizes.layout(Layout(3), all_sample=False) == Layout(8, CHUNKS, CHUNK_TOKENS[0])


def test_the_largest_of_a_set_of_families_is_captured_first() -> None:
    rows = [key.layout.rows for key in GraphSizes(32, (True,)).decode_keys((CORE,), (1, 8, 32))]
    assert rows == [32, 8, 1, 32, 8, 1]


def test_what_is_asked_for_is_what_is_given() -> None:
    sizes = GraphSizes(8, (True, False))
    assert sizes.prompts == (CHUNKS, CHUNK_TOKENS[-1])
    decodes = sizes.decode_keys((CORE, NO_FAMILIES), (2, 8))
    assert set(decodes) == {
        GraphKey(Layout(rows), short, greedy, active)
        for rows in (2, 8)
        for short in (True, False)
        for greedy in (True, False)
        for active in (CORE, NO_FAMILIES)
    }
    prompts = sizes.prompt_keys((CORE,), (16, 64), (0, 8))
    assert set(prompts) == {
        GraphKey(Layout(rows, CHUNKS, tokens), short, False, CORE)
        for rows in (0, 8)
        for tokens in (16, 64)
        for short in (True, False)
    }
    assert (len(decodes), len(prompts)) == (16, 8)
    assert not sizes.decode_keys((CORE,), ())
    assert not sizes.prompt_keys((CORE,), ())
    assert not sizes.prompt_keys((CORE,), (16,), ())


def test_what_is_planned_comes_first_then_what_steps_wanted_most() -> None:
    captured = Graphs[str](enabled=True, is_full=lambda: False)
    captured.record_after = 10
    a, b, c, d, e = keys(5)
    captured.add(b, "graph")
    captured.plan([a, b])
    captured.plan([c])
    for times, key in ((2, d), (3, e)):
        assert not any(captured.wants(key) for _ in range(times))
    assert captured.get(b) == "graph"
    assert captured.get(a) is None
    assert [captured.next() for _ in range(6)] == [a, c, e, d, None, None]
    assert captured.num_wanted == 0


def test_a_step_stops_for_a_graph_that_was_wanted_often() -> None:
    captured = Graphs[str](enabled=True, is_full=lambda: True)
    captured.record_after = 3
    a, b = keys(2)
    assert [captured.wants(key) for key in (a, a, b, a, a, b, b)] == [
        *(False, False, False, True),
        *(False, False, True),
    ]
    assert captured.next() is None, "memory is kept for steps"
    eager = GraphKey(Layout(1), True, True, ActiveFamilies(spectral=True))
    assert not any(captured.wants(eager) for _ in range(9))
    assert captured.num_wanted == 1


def test_there_is_an_end_to_graphs_and_to_what_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "GRAPHS_MAX", 4)
    captured = Graphs[str](enabled=True, is_full=lambda: False)
    captured.record_after = 2
    for key in keys(30):
        captured.wants(key)
        assert captured.num_wanted <= 4
    captured = Graphs[str](enabled=True, is_full=lambda: False)
    captured.record_after = 2
    assert not any(captured.wants(key) for key in keys(4))
    assert captured.wants(keys(4)[0]), "what is counted already makes nothing forgotten"
    for key in keys(4):
        captured.add(key, "graph")
    captured.plan(keys(9))
    assert captured.next() is None
    assert not captured.wants(keys(9)[-1])


def test_after_one_that_failed_none_is_tried() -> None:
    captured = Graphs[str](enabled=True, is_full=lambda: False)
    captured.plan(keys(3))
    captured.stop()
    assert captured.next() is None
    assert not captured.wants(keys(1)[0])
