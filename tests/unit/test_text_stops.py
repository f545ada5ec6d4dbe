"""Stop strings: the scanner against str.find on the whole text, for any chunking."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from text.errors import TextInputError
from text.stops import StopScanner

pytestmark = pytest.mark.unit

# Two letters make overlaps, self-overlaps and stops within stops common.
_LETTERS = st.text(alphabet="ab", max_size=40)
_STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=6), max_size=4)


def _expected(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The stop that ends first in the whole text, the longest of those that end there, by str.find."""
    found = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop in text]
    if not found:
        return text, None
    _, start, stop = min(found)
    return text[:start], stop


def _chunks(text: str, cuts: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[start:end] for start, end in pairwise(edges)]


@settings(max_examples=600, deadline=None)
@given(text=_LETTERS, stops=_STOPS, cuts=st.lists(st.integers(min_value=0), max_size=12))
def test_any_chunking_gives_what_a_search_of_the_whole_text_gives(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    scanner, shown, matched = StopScanner(stops), "", None
    for chunk in _chunks(text, cuts):
        safe, matched = scanner.feed(chunk)
        shown += safe
    shown += scanner.flush()
    assert (shown, matched) == _expected(text, stops)


@settings(max_examples=300, deadline=None)
@given(text=_LETTERS, stops=_STOPS)
def test_only_what_may_become_a_stop_string_is_held_back(text: str, stops: list[str]) -> None:
    scanner, fed, shown = StopScanner(stops), "", ""
    for char in text:
        safe, matched = scanner.feed(char)
        fed, shown = fed + char, shown + safe
        if matched is not None:
            return
        held = fed[len(shown) :]
        assert held == "" or any(stop.startswith(held) for stop in stops)


def test_text_after_a_match_is_not_shown() -> None:
    scanner = StopScanner(["STOP"])
    assert scanner.feed("one STOP two") == ("one ", "STOP")
    assert scanner.feed("three") == ("", "STOP")
    assert scanner.flush() == ""


def test_a_prefix_of_a_stop_string_is_shown_once_it_cannot_become_one() -> None:
    scanner = StopScanner(["</end>"])
    assert scanner.feed("a</en") == ("a", None)
    assert scanner.feed("ter") == ("</enter", None)


def test_a_held_prefix_is_given_back_when_the_answer_ends() -> None:
    scanner = StopScanner(["\n\nUser:"])
    assert scanner.feed("hello\n\nUs") == ("hello", None)
    assert scanner.flush() == "\n\nUs"
    assert scanner.flush() == ""


def test_of_stops_that_end_together_the_longest_counts() -> None:
    assert StopScanner(["c", "abc", "bc"]).feed("xabcx") == ("x", "abc")


def test_without_stop_strings_nothing_is_held_back() -> None:
    assert StopScanner([]).feed("anything") == ("anything", None)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(TextInputError, match="empty"):
        StopScanner(["a", ""])
