"""Keeps web pages out of a server without keys. Pure.

Only this machine reaches it, but that is where its user's browser runs. A page may send it a form
(then ``Origin`` says whose page it is), and a page whose own name was made to lead to this machine
may also read the answers (then ``Host`` is that name; "DNS rebinding").
"""

import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit

from shoal.server.errors import Forbidden

_HINT = "make a key with `shoal keys create`, or ask 127.0.0.1"


def must_be_local(headers: Mapping[bytes, bytes], listens_on: str) -> None:
    """Raise Forbidden if a page from elsewhere may have made the request.

    Args:
        listens_on: ``--host``.
    """
    host = headers.get(b"host", b"").decode("latin-1")
    name = _name_of(f"//{host}")
    if host and not (_address(name) or _is_ours(name, listens_on)):
        raise Forbidden(
            f"this server has no API keys and does not answer to the name {host[:100]!r}: {_HINT}"
        )
    origin = headers.get(b"origin", b"").decode("latin-1")
    name = _name_of(origin)
    address = _address(name)
    if origin and not (address.is_loopback if address else _is_ours(name, listens_on)):
        raise Forbidden(
            f"this server has no API keys and takes nothing from the page {origin[:100]!r}: {_HINT}"
        )


def _name_of(url: str) -> str:
    """The host in ``url``, '' if there is none, as in the origin ``null``."""
    try:
        return (urlsplit(url).hostname or "").rstrip(".")
    except ValueError:  # half an IPv6 address
        return ""


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """No page's name is an address, so that none can lead elsewhere than it says."""
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _is_ours(name: str, listens_on: str) -> bool:
    """Whether nobody else can have ``name``: those of the world have a dot."""
    if not name:
        return False
    return "." not in name or name.endswith(".localhost") or name == listens_on.lower()
