"""What becomes of a finished adapter: written, published, and noted, beside the training.

One thread does it in the order in which tenants finish, so that steps need not wait for a disk or a
database. Nothing counts as finished before it is written.
"""

import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from shoal.adapters.errors import AdapterError
from shoal.adapters.formats.container import write_atomically
from shoal.adapters.registry.errors import RegistryError
from shoal.adapters.training.fleet.tenants import Tenant

log = logging.getLogger(__name__)

# A registry that is away for a moment is asked again after these seconds.
RETRY_S = (0.5, 2.0, 8.0)
# Adapters that wait to be written; a step that finishes more waits for the disk.
PENDING_MAX = 256


class Publisher(Protocol):
    """Puts an adapter directory into a registry."""

    def publish(self, tenant: Tenant, directory: Path) -> str:
        """What the adapter is called there, such as ``owner/name@1``."""


@dataclass(frozen=True, slots=True)
class Finished:
    """How a tenant ended.

    Attributes:
        reference: ``owner/name`` or ``name``.
        fate: ``finished``; ``patience``, stopped early since evaluations got no better; or
            ``diverged``: it has no adapter.
        steps: updates made.
        loss: of the last step; None when it is not a number.
        eval_loss: the loss of the evaluation whose values were written, or the last; None without.
        published: what the registry calls it; None when there was none, or it refused.
        problem: why it was not published.
    """

    reference: str
    fate: str
    steps: int
    loss: float | None
    eval_loss: float | None
    published: str | None = None
    problem: str | None = None


class Finishing:
    """The thread. Enter it before the first ``add``; leaving waits for everything."""

    def __init__(
        self,
        results: Path,
        publisher: Publisher | None,
        on_finished: Callable[[Finished], None] | None = None,
    ) -> None:
        """Nothing happens yet.

        Args:
            results: JSONL to which each result is added.
            publisher: where adapters go besides their directory.
            on_finished: called on the thread, after each.
        """
        self.finished: list[Finished] = []
        self._results = results
        self._publisher = publisher
        self._on_finished = on_finished
        self._jobs: queue.Queue[tuple[Tenant, Finished, Callable[[], None]] | None]
        self._jobs = queue.Queue(PENDING_MAX)
        self._failure: BaseException | None = None
        self._away = False
        self._thread = threading.Thread(target=self._work, name="finishing", daemon=True)

    def add(self, tenant: Tenant, result: Finished, write: Callable[[], None]) -> None:
        """Have an adapter written by ``write``, then published and noted.

        Raises:
            OSError: an earlier one could not be written.
        """
        self.check()
        self._jobs.put((tenant, result, write))

    def adopt(self, results: Sequence[Finished], tenants: Mapping[str, Tenant]) -> None:
        """Begin with who was finished before, as a checkpoint says; once, before the first ``add``.

        The file of results says the same afterwards. What was not published is tried again.
        """
        write_atomically(self._results, [])
        for result in results:
            self._jobs.put((tenants[result.reference], result, lambda: None))
        self.settle()

    def settle(self) -> list[Finished]:
        """Wait until everything added is done; all results so far."""
        self._jobs.join()
        self.check()
        return list(self.finished)

    def check(self) -> None:
        """Raise what went wrong on the thread."""
        if self._failure is not None:
            raise self._failure

    def __enter__(self) -> "Finishing":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                if self._failure is None:
                    self._finish(*job)
            except BaseException as error:  # told to the trainer, which stops
                self._failure = error
            finally:
                self._jobs.task_done()
        self._jobs.task_done()

    def _finish(self, tenant: Tenant, result: Finished, write: Callable[[], None]) -> None:
        write()
        publisher = None if result.published else self._publisher
        if result.fate != "diverged" and publisher is not None:
            result = self._publish(publisher, tenant, result)
        self.finished.append(result)
        with self._results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(result)) + "\n")
        if self._on_finished is not None:
            self._on_finished(result)

    def _publish(self, publisher: Publisher, tenant: Tenant, result: Finished) -> Finished:
        """The adapter lies in its directory already: what goes wrong here loses nothing."""
        fields = asdict(result)
        # Once it has been away for long, nobody waits for it any more until it answers again.
        for wait in (*(() if self._away else RETRY_S), None):
            try:
                name = publisher.publish(tenant, tenant.config.out)
                self._away = False
                return Finished(**{**fields, "published": name, "problem": None})
            except RegistryError as error:
                problem = str(error)
                if wait is None:
                    self._away = True
                    break
                time.sleep(wait)
            except AdapterError as error:
                problem = str(error)
                break
        log.warning("not published adapter=%s error=%s", tenant.reference, problem)
        return Finished(**{**fields, "published": None, "problem": problem})
