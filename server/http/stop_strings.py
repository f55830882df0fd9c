"""Stop strings: found across token borders, with the text that might begin one held back. Pure."""

from collections.abc import Sequence


class StopMatcher:
    """Cuts a text that arrives in pieces before the first stop string in it.

    "First" is the match that is complete first, as if one looked after every character; of those
    complete at the same character, the longest. So the pieces' borders never matter.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = sorted(stops, key=len, reverse=True)
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Take the next piece; return what may be shown. ``matched`` tells that the end was met."""
        if not self._stops or self.matched is not None:
            return "" if self.matched is not None else text
        text = self._held + text
        found = self._find(text)
        if found is not None:
            end, stop = found
            self.matched, self._held = stop, ""
            return text[: end if self._include else end - len(stop)]
        keep = self._undecided(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The text held back, when nothing more will come."""
        text, self._held = self._held, ""
        return text

    def _find(self, text: str) -> tuple[int, str] | None:
        best: tuple[int, str] | None = None
        for stop in self._stops:  # longest first, so that ties keep the longest
            start = text.find(stop)
            if start >= 0 and (best is None or start + len(stop) < best[0]):
                best = (start + len(stop), stop)
        return best

    def _undecided(self, text: str) -> int:
        """Length of the longest end of ``text`` that begins a stop string."""
        for length in range(min(len(self._stops[0]) - 1, len(text)), 0, -1):
            tail = text[len(text) - length :]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
