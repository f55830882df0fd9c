"""Rules that find the answer in what was generated, and what counts as equal.

Two answers are equal when they are after Unicode normalisation (NFC), removal of white space at
both ends and replacement of every other run of it by one space. Case and punctuation count.
"""

import re
import unicodedata
from collections.abc import Callable, Mapping

_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")
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
    number: str = found[-1].replace(",", "").lstrip("+")
    return number.rstrip("0").rstrip(".") if "." in number else number


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


def normalised(text: str) -> str:
    """What is compared."""
    return " ".join(unicodedata.normalize("NFC", text).split())
