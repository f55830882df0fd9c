"""Who a request comes from, and what that one may do. Pure.

Three roles: a *read-only* key generates, and looks at adapters; a *tenant* key also changes its
owner's adapters; an *admin* key acts for every owner, and sees what concerns them all.
"""

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from shoal.adapters.registry.keys import Limits, Role
from shoal.adapters.spec import ADAPTER_NAME
from shoal.server.errors import Forbidden

_SCOPE_KEY = "shoal.caller"


class Owned(Protocol):
    """The part of ``AdapterInfo`` that says how to refer to it."""

    @property
    def owner(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def reference(self) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """On whose behalf a request is made.

    Attributes:
        owner: whose bare names it uses, and who is charged; '' on a server without tenants.
        limits: what the owner may take, and its share of a busy server; none by default.
    """

    owner: str
    role: Role
    limits: Limits = field(default_factory=Limits)

    def acts_on(self, reference: str) -> tuple[str, str]:
        """On whose behalf to look up ``reference``, and what to look up.

        ``owner/name`` is that owner's own ``name`` to that owner and to an admin. To everybody
        else it stays a reference to what may have been shared.
        """
        whose, slash, name = reference.partition("/")
        if slash and ADAPTER_NAME.fullmatch(whose) and self.role == "admin":
            return whose, name
        if slash and whose == self.owner:
            return whose, name
        return self.owner, reference

    def name_of(self, adapter: Owned) -> str:
        """How this caller refers to ``adapter``: bare if it is the caller's own."""
        return adapter.name if adapter.owner == self.owner else adapter.reference

    def sees_all_of(self, adapter: Owned) -> bool:
        """Whether ``adapter`` is the caller's own, and not only shared with it."""
        return self.role == "admin" or adapter.owner == self.owner

    def must_write(self) -> None:
        """Raise Forbidden unless the caller may change adapters."""
        if self.role == "read-only":
            raise Forbidden("this API key is read-only: it may not change adapters")

    def must_be_admin(self, what: str) -> None:
        """Raise Forbidden unless the caller is an admin; ``what`` is what it wants to do."""
        if self.role != "admin":
            raise Forbidden(f"only an admin key may {what}")


# Who asks where there are no keys, and who has a key given with --api-key.
EVERYTHING = Caller(owner="", role="admin")


def caller_of(scope: Mapping[str, Any]) -> Caller:
    """Who sent the request: what ``auth.Authenticate`` found. Takes a request or its scope."""
    caller = scope[_SCOPE_KEY]
    assert isinstance(caller, Caller)
    return caller


def has_caller(scope: Mapping[str, Any]) -> bool:
    """Whether anybody was asked who it is: not by the routes that are open to all."""
    return _SCOPE_KEY in scope


def set_caller(scope: MutableMapping[str, Any], caller: Caller) -> None:
    """Let ``caller_of(scope)`` be ``caller``."""
    scope[_SCOPE_KEY] = caller
