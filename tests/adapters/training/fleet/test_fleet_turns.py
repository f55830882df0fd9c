"""Turns: who is in a step, who waits, and that nobody is forgotten."""

import random

import pytest

from shoal.adapters.training.fleet.turns import Turns


def test_all_that_fit_are_in_every_step() -> None:
    turns = Turns(3, 8, {"a": 2, "b": 2, "c": 2})
    assert turns.admit() == ["a", "b", "c"]
    for _ in range(3):
        assert turns.wave() == ["a", "b", "c"]
        turns.pass_on(turns.wave())


def test_more_than_fit_take_turns_in_order() -> None:
    turns = Turns(5, 4, dict.fromkeys("abcde", 2))
    turns.admit()
    waves = []
    for _ in range(5):
        waves.append("".join(turns.wave()))
        turns.pass_on(turns.wave())
    assert waves == ["ab", "cd", "ea", "bc", "de"]


def test_a_large_tenant_is_not_passed_over_by_small_ones() -> None:
    turns = Turns(3, 4, {"a": 2, "big": 4, "b": 2})
    turns.admit()
    waves = []
    for _ in range(4):
        waves.append(turns.wave())
        turns.pass_on(waves[-1])
    assert waves == [["a"], ["big"], ["b", "a"], ["big"]]


def test_a_finished_tenant_makes_room_for_one_who_waits() -> None:
    turns = Turns(2, 8, dict.fromkeys("abcd", 1))
    assert turns.admit() == ["a", "b"]
    assert turns.leave("a") == 0
    assert turns.admit() == ["c"]
    assert turns.slots == {"b": 1, "c": 0}
    assert turns.wave() == ["b", "c"]


@pytest.mark.parametrize("seed", range(20))
def test_everybody_gets_equally_many_turns_until_finished(seed: int) -> None:
    draw = random.Random(seed)
    rows, names = draw.randint(3, 9), [f"t{i}" for i in range(draw.randint(1, 30))]
    sizes = {name: draw.randint(1, 3) for name in names}
    wanted = {name: draw.randint(1, 6) for name in names}
    turns = Turns(draw.randint(1, 12), rows, sizes)
    made = dict.fromkeys(names, 0)
    for _ in range(1000):
        turns.admit()
        if turns.over:
            break
        wave = turns.wave()
        assert wave
        assert sum(sizes[name] for name in wave) <= rows
        slots = [turns.slots[name] for name in turns.order]
        assert len(set(slots)) == len(slots)
        turns.pass_on(wave)
        for name in wave:
            made[name] += 1
            if made[name] == wanted[name]:
                turns.leave(name)
        if draw.random() < 0.2:  # as after an interruption
            again = Turns(12, rows, sizes)
            done = [name for name in names if made[name] == wanted[name]]
            again.restore(turns.order, turns.slots, done)
            assert again.wave() == turns.wave()
            assert again.waiting == turns.waiting
    assert made == wanted
