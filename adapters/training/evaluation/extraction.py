"""Rules that find the answer in what was generated, and what counts as equal.

Two answers are equal when they are after Unicode normalisation (NFC), removal of white space at
both ends and replacement of every other run of it by one space. Case and punctuation count.
"""

import re
import unicodedata
from collections.abc import Callable, Mapping

# A sign belongs to a number unless it stands behind something it could be taken off of ("3-5"), and
# a comma only where it parts thousands ("1,234", not "1,2,3").
_NUMBER = re.compile(
    r"(?:(?<![\w.)])[-+])?"
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)"
)
_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def whole(text: str) -> str:
    """All of it, without the white space at both ends."""
    return text.strip()


def first_line(text: str) -> str:
    """The first line that is not blank."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def last_number(text: str) -> str:
    """The last number, without thousands separators, a plus sign, or zeros behind its point."""
    found = _NUMBER.findall(text)
    if not found:
        return ""
    number: str = found[-1].replace(",", "")
    sign = "-" if number.startswith("-") else ""
    whole_part, _, fraction = number.lstrip("+-").partition(".")
    fraction = fraction.rstrip("0")
    digits = (whole_part or "0") + (f".{fraction}" if fraction else "")
    return digits if digits.strip("0.") == "" else sign + digits


def answer_tag(text: str) -> str:
    """What stands between the last ``<answer>`` and ``</answer>``; all of it without a pair."""
    found = _TAG.findall(text)
    return found[-1].strip() if found else text.strip()


RULES: Mapping[str, Callable[[str], str]] = {
    "whole": whole,
    "first-line": first_line,
    "last-number": last_number,
    "answer-tag": answer_tag,
}

# Rules that once found something else; part of a task's digest, so that old scores stay apart.
REVISIONS: Mapping[str, int] = {"last-number": 2}


def wanted(rule: str, answer: str) -> str:
    """What an answer of the data is compared as: a number as the rule would write it."""
    return (rule == "last-number" and last_number(answer)) or answer


def normalised(text: str) -> str:
    """What is compared."""
    return " ".join(unicodedata.normalize("NFC", text).split())
