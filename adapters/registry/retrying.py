"""Trying again, for a bounded time: calls to a storage on the other side of a network."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

# Another try would end the same. Everything else that a storage's client raises may pass: there is
# no common list of what clients raise for a lost connection.
PERMANENT = (
    FileNotFoundError,
    PermissionError,
    NotImplementedError,
    AssertionError,
    TypeError,
    AttributeError,
)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait and how often to try.

    Attributes:
        attempts: tries in all, from 1.
        first_wait_s, longest_wait_s: the wait doubles from the one to the other; half of each is
            drawn at random, so that many clients do not come back together.
        call_s: limit on one try.
    """

    attempts: int = 4
    first_wait_s: float = 0.1
    longest_wait_s: float = 2.0
    call_s: float = 30.0

    def wait_s(self, tries: int) -> float:
        """How long to wait after so many failed tries."""
        wait = min(self.first_wait_s * 2.0 ** (tries - 1), self.longest_wait_s)
        return wait * random.uniform(0.5, 1.0)


def retried(
    call: Callable[[], T], patience: Patience, sleep: Callable[[float], None] = time.sleep
) -> T:
    """What ``call`` returns, trying again after errors that may pass.

    Raises:
        Whatever the last try raised.
    """
    for tries in range(1, patience.attempts):
        try:
            return call()
        except PERMANENT:
            raise
        except Exception:
            sleep(patience.wait_s(tries))
    return call()
