"""What can be wrong with an adapter.

::

    AdapterError
    ├── AdapterRejected      the upload cannot be served: names the tensor or field, and the rule
    ├── AdapterTooLarge      a byte limit was exceeded
    ├── AdapterNotFound      no such name or version (or not visible to the caller)
    ├── BlendRefused         these adapters exist, and their sum cannot be served
    ├── AdapterConflict      the name is reserved, or a concurrent change won
    ├── AdapterNameInvalid   the name does not match the naming rule
    └── AdapterQuotaExceeded the owner may not have that much

Messages say what, the value and the rule, so that they can be shown to the caller unchanged.
"""

from functools import partial
from typing import Any


class AdapterError(Exception):
    """Base of every adapter error; its text is safe to show to the client."""


class AdapterRejected(AdapterError):
    """The adapter cannot be served.

    Attributes:
        where: the tensor, config field or file at fault.
        rule: what was expected of it.
    """

    def __init__(self, where: str, rule: str) -> None:
        super().__init__(f"{where}: {rule}")
        self.where = where
        self.rule = rule

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.where, self.rule)


class AdapterTooLarge(AdapterError):
    """A file or adapter exceeds a configured byte limit."""


class AdapterNotFound(AdapterError):
    """No such adapter or version."""


class BlendRefused(AdapterError):
    """The weighted sum of some adapters cannot be served, however often it is tried."""


class AdapterConflict(AdapterError):
    """The request contradicts what exists."""


class AdapterNameInvalid(AdapterError):
    """The adapter name does not match ``[a-z0-9][a-z0-9._-]{0,127}``."""


class AdapterQuotaExceeded(AdapterError):
    """The owner has as much as it may have, or would have more.

    Attributes:
        limit: what of: ``adapters`` or ``bytes``.
        allowed, used: how many the owner may have, and has.
        needed: how many more it would need; None if that is not known yet, but it is some.
    """

    def __init__(self, limit: str, *, allowed: int, used: int, needed: int | None) -> None:
        more = "more" if needed is None else f"{needed} more"
        super().__init__(
            f"this key's limit is {allowed} {limit}: {used} are in use, and this needs {more}; "
            "deleting adapters makes room"
        )
        self.limit = limit
        self.allowed = allowed
        self.used = used
        self.needed = needed

    def __reduce__(self) -> tuple[Any, ...]:
        whole = partial(type(self), allowed=self.allowed, used=self.used, needed=self.needed)
        return whole, (self.limit,)
