"""Stop strings are found wherever the pieces' borders fall."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from shoal.server.http.stop_strings import StopMatcher

TEXT = st.text("abc", max_size=40)
STOPS = st.lists(st.text("abc", min_size=1, max_size=5), max_size=4)


def naive(text: str, stops: list[str], include: bool) -> tuple[str, bool]:
    """Look at the text after every character, as the words promise."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end if include else end - max(map(len, found))], True
    return text, False


@given(TEXT, STOPS, st.booleans(), st.lists(st.integers(0, 40)))
def test_any_split_gives_what_one_piece_gives(
    text: str, stops: list[str], include: bool, cuts: list[int]
) -> None:
    matcher = StopMatcher(stops, include=include)
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    shown = ""
    for start, end in pairwise(borders):
        shown += matcher.push(text[start:end])
        # Never shown before it is certain, and never taken back.
        assert naive(text, stops, include)[0].startswith(shown)
    shown += matcher.flush()
    assert (shown, matcher.matched is not None) == naive(text, stops, include)


@given(TEXT, STOPS)
def test_no_more_is_held_back_than_a_stop_string_could_need(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = "".join(matcher.push(character) for character in text)
    if matcher.matched is None:
        assert len(text) - len(shown) < max(map(len, stops), default=1)


def test_the_matched_string_is_named_and_later_text_ignored() -> None:
    matcher = StopMatcher(["\n\nUser:", "END"])
    assert matcher.push("one\n\nUs") == "one"
    assert matcher.push("eless\n\nUser: hi") == "\n\nUseless"
    assert matcher.matched == "\n\nUser:"
    assert matcher.push("more") == ""
    assert matcher.flush() == ""
