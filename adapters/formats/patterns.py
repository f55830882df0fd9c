"""PEFT's ``rank_pattern`` and ``alpha_pattern`` keys, matched in bounded time.

PEFT matches a key ``k`` with ``re.match(r"(.*\\.)?(k)$", module path)``. The keys come from
strangers and Python's `re` can take exponential time while it holds the interpreter, so this module
accepts the part of the syntax that such keys use (characters, ``.``, ``\\.``, ``\\d``, classes like
``[0-9]``, each optionally followed by ``*``, ``+`` or ``?``, and a leading ``^``) and matches it by
advancing a set of positions, in time proportional to key times path. Keys without ``*+?``, which
are nearly all of them, have one length and so one place to match, which `re` does in linear time.
Anything else is refused, never guessed.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

PATTERN_CHARS_MAX = 128
_LITERAL = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-/ ")


@dataclass(frozen=True, slots=True)
class _Item:
    accepts: Callable[[str], bool]
    optional: bool
    repeats: bool


@dataclass(frozen=True, slots=True)
class Pattern:
    """A parsed key; see the module."""

    items: tuple[_Item, ...]
    anchored: bool
    fixed: re.Pattern[str] | None

    def matches(self, path: str) -> bool:
        """Whether PEFT would apply the key to a module, given its path in the model."""
        if self.fixed is not None:
            start = len(path) - len(self.items)
            begins = start == 0 or (start > 0 and not self.anchored and path[start - 1] == ".")
            return begins and self.fixed.fullmatch(path, start) is not None
        positions = {0}
        if not self.anchored:
            positions |= {i + 1 for i, character in enumerate(path) if character == "."}
        for item in self.items:
            if not positions:
                return False
            positions = _advance(positions, item, path)
        return len(path) in positions


def parse_pattern(text: str) -> Pattern | None:
    """Parse a key, or None when it uses syntax outside the accepted part."""
    if len(text) > PATTERN_CHARS_MAX:
        return None
    anchored = text.startswith("^")
    index = 1 if anchored else 0
    items = []
    while index < len(text):
        parsed = _parse_atom(text, index)
        if parsed is None:
            return None
        accepts, index = parsed
        sign = text[index] if index < len(text) and text[index] in "*+?" else ""
        index += len(sign)
        items.append(_Item(accepts, optional=sign in ("*", "?"), repeats=sign in ("*", "+")))
    quantified = any(item.optional or item.repeats for item in items)
    # Only syntax that the loop above has accepted, which means the same to `re`, is compiled.
    fixed = None if quantified else re.compile(text.removeprefix("^"))
    return Pattern(tuple(items), anchored, fixed)


def _parse_atom(text: str, index: int) -> tuple[Callable[[str], bool], int] | None:
    character = text[index]
    if character in _LITERAL:
        return character.__eq__, index + 1
    if character == ".":
        return _anything, index + 1
    if character == "\\":
        escaped = text[index + 1 : index + 2]
        if escaped == "d":
            return _is_digit, index + 2
        if escaped in (".", "-", "/"):
            return escaped.__eq__, index + 2
        return None
    if character == "[":
        end = text.find("]", index)
        members = _class_members(text[index + 1 : end]) if end > 0 else None
        return None if members is None else (members.__contains__, end + 1)
    return None


def _class_members(body: str) -> frozenset[str] | None:
    """The characters of a class such as ``0-9`` or ``qkv``; None when empty or negated."""
    members: set[str] = set()
    index = 0
    while index < len(body):
        first = body[index]
        if first not in _LITERAL or first in "-/ ":
            return None
        if body[index + 1 : index + 2] == "-":
            last = body[index + 2 : index + 3]
            if not last or last not in _LITERAL or last in "-/ " or first > last:
                return None
            members |= {chr(code) for code in range(ord(first), ord(last) + 1)}
            index += 3
        else:
            members.add(first)
            index += 1
    return frozenset(members) or None


def _advance(positions: set[int], item: _Item, path: str) -> set[int]:
    """Where a match can stand after one item."""
    reached = set(positions) if item.optional else set()
    frontier = positions
    while frontier:
        frontier = {p + 1 for p in frontier if p < len(path) and item.accepts(path[p])} - reached
        reached |= frontier
        if not item.repeats:
            break
    return reached


def _anything(character: str) -> bool:
    return True


def _is_digit(character: str) -> bool:
    return character in "0123456789"
