"""What names, owners and tags may be, and what a reference to an adapter means. Pure."""

import re
from collections.abc import Mapping

from shoal.adapters.errors import AdapterNameInvalid, AdapterNotFound, AdapterRejected
from shoal.adapters.spec import ADAPTER_NAME

# Stands for all owners in the table of shares; no owner can be called so.
EVERYBODY = "*"
# Owns what comes with the software; no key is made for it.
SHIPPED_OWNER = "shoal"

TAGS_MAX = 16
TAG_VALUE_MAX = 256
_TAG_KEY = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


def validate_name(name: str) -> str:
    """Return ``name`` if it is a possible adapter name.

    Raises:
        AdapterNameInvalid: it is not.
    """
    if ADAPTER_NAME.fullmatch(name) is None:
        raise AdapterNameInvalid(
            f"adapter name {name[:200]!r} must be 1 to 128 characters of a-z, 0-9, '.', '_', '-' "
            "and start with a letter or digit"
        )
    return name


def validate_owner(owner: str) -> str:
    """Return ``owner`` if keys may have it. The owner '' of a server without keys is not one.

    Raises:
        AdapterRejected: it is not.
    """
    if ADAPTER_NAME.fullmatch(owner) is None:
        raise AdapterRejected(
            f"owner {owner[:200]!r}",
            "must be 1 to 128 characters of a-z, 0-9, '.', '_', '-' and start with a letter or "
            "digit",
        )
    return owner


def validate_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """A copy of ``tags``, by key.

    Raises:
        AdapterRejected: more than ``TAGS_MAX``, or a key or value that cannot be one.
    """
    if len(tags) > TAGS_MAX:
        raise AdapterRejected("tags", f"{len(tags)} of them, at most {TAGS_MAX} are kept")
    for key, value in tags.items():
        if not isinstance(key, str) or _TAG_KEY.fullmatch(key) is None:
            raise AdapterRejected(
                f"tag {str(key)[:100]!r}",
                "must be 1 to 64 characters of a-z, 0-9, '.', '_', '-' and start with a letter or "
                "digit",
            )
        if not isinstance(value, str) or len(value) > TAG_VALUE_MAX or not value.isprintable():
            raise AdapterRejected(
                f"tag {key!r}", f"must be text of at most {TAG_VALUE_MAX} printable characters"
            )
    return dict(sorted(tags.items()))


def split_reference(reference: str, owner: str) -> tuple[str, str] | None:
    """Owner and name that ``name`` or ``owner/name`` means to ``owner``; None if it cannot be."""
    whose, slash, name = reference.partition("/")
    if not slash:
        whose, name = owner, reference
    elif ADAPTER_NAME.fullmatch(whose) is None:
        return None
    # Before a database sees it: it may not even be valid Unicode.
    return (whose, name) if ADAPTER_NAME.fullmatch(name) else None


def not_found(reference: str, version: int | None = None) -> AdapterNotFound:
    """The one answer for what does not exist and for what the caller may not see."""
    shown = reference[:200] if version is None else f"{reference[:200]}@{version}"
    return AdapterNotFound(f"adapter {shown!r} does not exist")
