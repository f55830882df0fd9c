"""What happens to finished adapters when a registry or a disk fails."""

import json
from pathlib import Path

import pytest

from shoal.adapters.errors import AdapterRejected
from shoal.adapters.registry.errors import RegistryUnavailable
from shoal.adapters.training.config import TrainConfig
from shoal.adapters.training.fleet import finishing
from shoal.adapters.training.fleet.finishing import Finished, Finishing
from shoal.adapters.training.fleet.tenants import Tenant


def tenant(name: str) -> Tenant:
    here = Path(name)
    return Tenant(1, name, "", TrainConfig(method="miss", base=here, data=here, out=here))


def result(name: str, fate: str = "finished") -> Finished:
    return Finished(name, fate, steps=3, loss=1.0, eval_loss=None)


class Registry:
    """Fails as told: each publication takes the next of its answers."""

    def __init__(self, *answers: Exception | None) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    def publish(self, tenant: Tenant, directory: Path) -> str:
        self.asked.append(tenant.name)
        problem = self.answers.pop(0) if self.answers else None
        if problem is not None:
            raise problem
        return f"{tenant.name}@1"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finishing, "RETRY_S", (0.0, 0.0))


def test_a_registry_that_is_away_for_a_moment_is_asked_again(tmp_path: Path) -> None:
    registry = Registry(RegistryUnavailable("away"), None)
    with Finishing(tmp_path / "results", registry) as work:
        work.add(tenant("a"), result("a"), lambda: None)
        [end] = work.settle()
    assert (end.published, end.problem) == ("a@1", None)
    assert registry.asked == ["a", "a"]


def test_a_registry_that_stays_away_is_not_waited_for_each_time(tmp_path: Path) -> None:
    registry = Registry(*[RegistryUnavailable("away")] * 4, None, RegistryUnavailable("x"), None)
    with Finishing(tmp_path / "results", registry) as work:
        for name in "abcd":
            work.add(tenant(name), result(name), lambda: None)
        ends = work.settle()
    assert [end.published for end in ends] == [None, None, "c@1", "d@1"]
    assert registry.asked == list("aaabcdd")
    lines = [json.loads(line) for line in (tmp_path / "results").read_text().splitlines()]
    assert [line["problem"] for line in lines] == ["away", "away", None, None]


def test_what_is_refused_or_diverged_is_not_tried_again(tmp_path: Path) -> None:
    registry = Registry(AdapterRejected("adapter", "is bad"))
    with Finishing(tmp_path / "results", registry) as work:
        work.add(tenant("a"), result("a"), lambda: None)
        work.add(tenant("b"), result("b", "diverged"), lambda: None)
        refused, diverged = work.settle()
    assert "is bad" in str(refused.problem)
    assert (diverged.published, diverged.problem) == (None, None)
    assert registry.asked == ["a"]


def test_a_disk_that_fails_stops_the_training_and_finishes_nothing(tmp_path: Path) -> None:
    def full() -> None:
        raise OSError("no space left")

    registry = Registry()
    with Finishing(tmp_path / "results", registry) as work:
        work.add(tenant("a"), result("a"), full)
        with pytest.raises(OSError, match="no space left"):
            work.settle()
        with pytest.raises(OSError, match="no space left"):
            work.add(tenant("b"), result("b"), lambda: None)
    assert registry.asked == []
    assert work.finished == []


def test_what_was_not_published_before_is_published_when_going_on(tmp_path: Path) -> None:
    before = [
        result("a"),
        Finished("b", "finished", 3, 1.0, None, published="b@4"),
        result("c", "diverged"),
    ]
    registry = Registry()
    with Finishing(tmp_path / "results", registry) as work:
        work.adopt(before, {name: tenant(name) for name in "abc"})
        ends = work.settle()
    assert [end.published for end in ends] == ["a@1", "b@4", None]
    assert registry.asked == ["a"]
    assert len((tmp_path / "results").read_text().splitlines()) == 3
