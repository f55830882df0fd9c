"""What references meant lately: used while the database is away, and at no other time."""

import threading

import pytest

from shoal.adapters.errors import AdapterNotFound
from shoal.adapters.registry.catalog import AdapterInfo
from shoal.adapters.registry.errors import RegistryUnavailable
from shoal.adapters.registry.recent import MEANINGS_MAX, RecentMeanings


def info(name: str, version: int = 1, owner: str = "") -> AdapterInfo:
    return AdapterInfo(name, version, "d" * 64, "core", "x", 4, 9, 0.0, True, None, 64, owner)


def away() -> AdapterInfo:
    raise RegistryUnavailable("away")


def gone() -> AdapterInfo:
    raise AdapterNotFound("no such adapter")


def test_what_is_remembered_counts_only_while_the_database_is_away() -> None:
    recent = RecentMeanings()
    assert recent.look_up("", "a", lambda: info("a", 1)) == info("a", 1)
    assert recent.look_up("", "a", away) == info("a", 1)
    assert recent.look_up("", "a", lambda: info("a", 2)) == info("a", 2)
    assert recent.look_up("", "a", away) == info("a", 2)
    with pytest.raises(AdapterNotFound):
        recent.look_up("", "a", gone)
    for model in ("a", "a@1", "b", "", "a@", "/", "a/b/c"):
        with pytest.raises(RegistryUnavailable):
            recent.look_up("", model, away)


def test_everybody_gets_only_what_they_themselves_were_given() -> None:
    recent = RecentMeanings()
    recent.look_up("ann", "a", lambda: info("a", 1, "ann"))
    recent.look_up("bob", "ann/a", lambda: info("a", 1, "ann"))
    recent.look_up("bob", "ann/a@7", lambda: info("a", 7, "ann"))
    assert recent.look_up("ann", "ann/a", away).owner == "ann", "the same adapter"
    assert recent.look_up("bob", "ann/a@7", away).version == 7
    for asker, model in (("bob", "a"), ("cat", "ann/a"), ("", "a"), ("ann", "a@7")):
        with pytest.raises(RegistryUnavailable):
            recent.look_up(asker, model, away)
    with recent.changing("ann", "a"):
        pass  # such as taking the share back
    for asker, model in (("ann", "a"), ("bob", "ann/a"), ("bob", "ann/a@7")):
        with pytest.raises(RegistryUnavailable):
            recent.look_up(asker, model, away)


def test_a_look_up_that_a_change_overtook_is_not_remembered() -> None:
    recent = RecentMeanings()

    def overtaken() -> AdapterInfo:
        old = info("a", 1)
        with recent.changing("", "a"):
            pass
        return old

    assert recent.look_up("", "a", overtaken).version == 1
    with pytest.raises(RegistryUnavailable):
        recent.look_up("", "a", away)


def test_a_change_that_was_not_answered_leaves_what_is_known() -> None:
    recent = RecentMeanings()
    recent.look_up("", "a", lambda: info("a"))
    with pytest.raises(RegistryUnavailable), recent.changing("", "a"):
        away()
    assert recent.look_up("", "a", away) == info("a")


def test_the_oldest_are_forgotten() -> None:
    recent = RecentMeanings(names_max=3)
    for name in "abcadef":
        recent.look_up("", name, lambda name=name: info(name))  # type: ignore[misc]
    assert [recent.look_up("", name, away).name for name in "def"] == list("def")
    for name in "abc":
        with pytest.raises(RegistryUnavailable):
            recent.look_up("", name, away)
    for version in range(1, MEANINGS_MAX + 2):
        recent.look_up("", f"f@{version}", lambda version=version: info("f", version))  # type: ignore[misc]
    assert recent.look_up("", f"f@{MEANINGS_MAX + 1}", away).version == MEANINGS_MAX + 1
    with pytest.raises(RegistryUnavailable):
        recent.look_up("", "f@1", away)


def test_threads_that_change_and_look_up_never_leave_an_older_version() -> None:
    recent = RecentMeanings()
    now = [0]

    def change() -> None:
        for version in range(1, 500):
            with recent.changing("", "a"):
                now[0] = version

    def look() -> None:
        while now[0] < 499:
            recent.look_up("", "a", lambda: info("a", now[0]))
            known = now[0]
            try:
                seen = recent.look_up("", "a", away).version
            except RegistryUnavailable:
                continue
            # The change that is under way may be forgotten a moment later.
            assert seen >= known - 1

    threads = [threading.Thread(target=look) for _ in range(3)] + [threading.Thread(target=change)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
