"""Progress bars of start-up: one for each kind of work, shown where somebody watches a terminal."""

from contextlib import ExitStack
from types import TracebackType
from typing import Any

from tqdm import tqdm


class Bars:
    """Call it with (what is being done, how much is done, how much there is)."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._bars: dict[str, Any] = {}

    def __enter__(self) -> "Bars":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def __call__(self, name: str, done: int, total: int) -> None:
        """Show it; a bar appears with the first call of its name."""
        if name not in self._bars:
            bar = tqdm(total=total, desc=name, disable=None)
            self._bars[name] = self._stack.enter_context(bar)
        self._bars[name].update(done - self._bars[name].n)
