"""What references meant lately: for the time in which the database cannot say.

Every look-up asks the database, and what it says is remembered here. That is used only when the
database cannot be reached, so that what is in memory goes on being served; while it answers,
nothing here is ever returned. Changes that this process makes are forgotten at once. One that
*another* process made, which can still reach the database, is not seen until this one can again:
an adapter that was replaced, deleted or unshared there is served meanwhile as it was.
"""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from shoal.adapters.errors import AdapterNotFound
from shoal.adapters.registry.catalog import AdapterInfo
from shoal.adapters.registry.errors import RegistryUnavailable
from shoal.adapters.registry.names import split_reference

# Names remembered, least recently used ones go first. About 1 KB each.
NAMES_MAX = 65_536
# … and of each name, versions by number and askers.
MEANINGS_MAX = 16
# The log says at most this often that this is in use.
_SAY_EVERY_S = 10.0

log = logging.getLogger(__name__)

# Of an adapter's name: who asked, and the version if it was named.
_Meanings = OrderedDict[tuple[str, str], AdapterInfo]


class RecentMeanings:
    """Look-ups that the database has answered; thread-safe.

    Args:
        names_max: names remembered.
    """

    def __init__(self, *, names_max: int = NAMES_MAX) -> None:
        self._names_max = names_max
        self._lock = threading.Lock()
        self._names: OrderedDict[tuple[str, str], _Meanings] = OrderedDict()
        self._changes = 0
        self._said = -_SAY_EVERY_S

    def look_up(self, asker: str, model: str, ask: Callable[[], AdapterInfo]) -> AdapterInfo:
        """What ``ask`` returns; when it cannot be asked, what it returned last.

        Args:
            asker: the owner on whose behalf.
            model: the reference; what ``asker`` meant by it is all that they can get.

        Raises:
            AdapterNotFound: as ``ask`` said.
            RegistryUnavailable: it cannot be asked, and never was or too long ago.
        """
        reference, _, version = model.partition("@")
        name = split_reference(reference, asker)
        if name is None:
            return ask()
        asked = (asker, version)
        changes = self._changes
        try:
            info = ask()
        except AdapterNotFound:
            self._forget(name, asked)
            raise
        except RegistryUnavailable as error:
            known = self._recall(name, asked)
            if known is None:
                raise
            self._say(error)
            return known
        self._remember(name, asked, info, changes)
        return info

    @contextmanager
    def changing(self, owner: str, reference: str) -> Iterator[None]:
        """This process changes what a name means in the block.

        What the database did not answer leaves what is known: it may not have happened.
        """
        name = split_reference(reference, owner)
        try:
            yield
        except RegistryUnavailable:
            name = None
            raise
        finally:
            with self._lock:
                # Look-ups that are under way may have seen what was before.
                self._changes += 1
                if name is not None:
                    self._names.pop(name, None)

    def _remember(
        self, name: tuple[str, str], asked: tuple[str, str], info: AdapterInfo, changes: int
    ) -> None:
        with self._lock:
            if changes != self._changes:
                return
            meanings = self._names.setdefault(name, OrderedDict())
            meanings[asked] = info
            meanings.move_to_end(asked)
            if len(meanings) > MEANINGS_MAX:
                meanings.popitem(last=False)
            self._names.move_to_end(name)
            if len(self._names) > self._names_max:
                self._names.popitem(last=False)

    def _forget(self, name: tuple[str, str], asked: tuple[str, str]) -> None:
        with self._lock:
            if name in self._names:
                self._names[name].pop(asked, None)

    def _recall(self, name: tuple[str, str], asked: tuple[str, str]) -> AdapterInfo | None:
        with self._lock:
            return self._names.get(name, _Meanings()).get(asked)

    def _say(self, error: RegistryUnavailable) -> None:
        now = time.monotonic()
        with self._lock:
            if now < self._said + _SAY_EVERY_S:
                return
            self._said = now
        log.warning("serving what adapters meant lately: %s", error)
