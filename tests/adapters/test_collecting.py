"""Garbage is collected by itself, some time in every hour, whatever goes wrong."""

import itertools
import logging
import threading
from collections.abc import Callable

import pytest

from shoal.adapters.registry.collecting import Collector
from shoal.adapters.registry.errors import RegistryUnavailable


class Day:
    """A day that is over after so many waits."""

    def __init__(self, waits: int) -> None:
        self._waits = waits
        self.now = 0.0
        self.over = threading.Event()

    def wait(self, seconds: float) -> bool:
        self.now += seconds
        self._waits -= 1
        if self._waits >= 0:
            return False
        self.over.set()
        return True


def run(collect: Callable[[Callable[[], bool]], int], waits: int) -> Day:
    day = Day(waits)
    collector = Collector(collect, interval_s=3600.0, wait=day.wait)
    collector.start()
    assert day.over.wait(60)
    collector.close()
    return day


def test_it_comes_once_in_an_interval_and_not_in_step_with_others() -> None:
    times: list[list[float]] = []
    for _ in range(8):
        day: list[float] = []
        clock = Day(24)

        def collect(_: Callable[[], bool], day: list[float] = day, clock: Day = clock) -> int:
            day.append(clock.now)
            return 0

        collector = Collector(collect, interval_s=3600.0, wait=clock.wait)
        collector.start()
        assert clock.over.wait(60)
        collector.close()
        times.append(day)
        assert len(day) == 24
        assert day[0] <= 3600.0
        gaps = [b - a for a, b in itertools.pairwise(day)]
        assert all(1800.0 <= gap <= 5400.0 for gap in gaps)
    assert len({day[0] for day in times}) == len(times)


@pytest.mark.parametrize("error", [RegistryUnavailable("away"), ValueError("a bug")])
def test_what_fails_is_logged_and_tried_again(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    calls = 0

    def collect(_: Callable[[], bool]) -> int:
        nonlocal calls
        calls += 1
        if calls < 3:
            raise error
        return 7

    with caplog.at_level(logging.INFO):
        run(collect, 3)
    assert calls == 3
    assert caplog.text.count("not collected") == 2
    assert "records=7" in caplog.text


def test_closing_stops_it_half_way_and_before_it_ever_began() -> None:
    started = threading.Event()

    def collect(stopping: Callable[[], bool]) -> int:
        started.set()
        while not stopping():
            pass
        return 1

    collector = Collector(collect, interval_s=0.0)
    collector.start()
    assert started.wait(60)
    collector.close()
    Collector(collect).close()
