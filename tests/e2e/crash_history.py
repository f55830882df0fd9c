"""What a registry may hold and answer, given the changes that were sent and acknowledged. Pure.

Every name has one writer, which sends one change at a time. So at any moment a name is in the state
after its last acknowledged change, or in the state after the one that is still unanswered.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class State:
    """What one name means; one that was deleted, or never was, has no versions.

    Attributes:
        versions: number -> which content.
        active: what the bare name means.
        following: the number that new content gets.
    """

    versions: Mapping[int, int] = field(default_factory=dict)
    active: int | None = None
    following: int = 1

    def uploaded(self, content: int) -> "State":
        """New content is a new version; content that is there is the version it already is."""
        for version, known in self.versions.items():
            if known == content:
                return replace(self, active=version)
        versions = {**self.versions, self.following: content}
        return State(versions, self.following, self.following + 1)

    def activated(self, version: int) -> "State":
        assert version in self.versions
        return replace(self, active=version)

    def deleted(self) -> "State":
        return State(following=self.following)

    def answers(self, asked: int | None) -> tuple[int, int] | None:
        """The version and content that the name, or one version of it, is answered with."""
        version = self.active if asked is None else asked
        if version is None or version not in self.versions:
            return None
        return version, self.versions[version]


@dataclass
class Entry:
    """One change of a name.

    Attributes:
        witnessed: an answer was seen that only this change, unacknowledged as it was, explains.
    """

    state: State
    acknowledged: bool = False
    witnessed: bool = False


class History:
    """The states of one name in order; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries = [Entry(State(), acknowledged=True)]

    @property
    def state(self) -> State:
        """After the last change that was acknowledged."""
        return self._entries[self.mark()].state

    @property
    def unanswered(self) -> Entry | None:
        """The change of which nobody knows whether it happened."""
        last = self._entries[-1]
        return None if last.acknowledged else last

    def send(self, state: State) -> None:
        """A change to ``state`` is about to be sent."""
        with self._lock:
            assert self._entries[-1].acknowledged, "one change at a time"
            self._entries.append(Entry(state))

    def acknowledge(self) -> None:
        """The change was answered."""
        with self._lock:
            self._entries[-1].acknowledged = True

    def settle(self, happened: bool) -> None:
        """It was found out whether the unanswered change happened."""
        with self._lock:
            last = self._entries[-1]
            assert not last.acknowledged
            if happened:
                last.acknowledged = True
            else:
                assert not last.witnessed, f"a change was seen and then lost: {last.state}"
                self._entries.append(Entry(self.state_before_last(), acknowledged=True))

    def state_before_last(self) -> State:
        """The state that the last change was made to."""
        return self._entries[-2].state

    def mark(self) -> int:
        """Where in time a request that is sent now begins: older states can only be stale."""
        for index in range(len(self._entries) - 1, -1, -1):
            if self._entries[index].acknowledged:
                return index
        raise AssertionError("the first entry is acknowledged")

    def explain(self, since: int, asked: int | None, seen: tuple[int, int | None] | None) -> bool:
        """Whether a request sent at ``since`` may have been answered with ``seen`` by now.

        Args:
            asked: the version in ``name@version``; None for the bare name.
            seen: version of the answer, and its content if that was seen; None for not found.
        """
        with self._lock:
            fitting = [e for e in self._entries[since:] if _fits(e.state.answers(asked), seen)]
            if fitting and not any(entry.acknowledged for entry in fitting):
                fitting[0].witnessed = True
            return bool(fitting)


def _fits(answer: tuple[int, int] | None, seen: tuple[int, int | None] | None) -> bool:
    if answer is None or seen is None:
        return answer is seen
    return answer[0] == seen[0] and seen[1] in (None, answer[1])
