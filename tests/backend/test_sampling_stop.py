"""Stop strings: found wherever the text is cut, with nothing held back that need not be."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_backend.errors import RequestError
from dspark_backend.sampling import StopStrings

alphabet = st.text("abc", max_size=14)


def stream(stops, deltas):
    """All the text let through, whether it was stopped, and the matched string."""
    matcher, out, stopped = StopStrings(stops), "", False
    for delta in deltas:
        emitted, stopped = matcher.feed(delta)
        out += emitted
    return out + matcher.flush(), stopped, matcher.matched


def by_definition(stops, text):
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], True, longest
    return text, False, None


@given(st.lists(st.text("abc", min_size=1, max_size=4), max_size=4), alphabet, st.data())
def test_the_result_is_the_definition_however_the_text_is_cut(stops, text, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    edges = [0, *cuts, len(text)]
    deltas = [text[a:b] for a, b in itertools.pairwise(edges)]
    assert stream(stops, deltas) == by_definition(stops, text)


@given(st.lists(st.text("abc", min_size=1, max_size=4), max_size=4), alphabet)
def test_only_what_could_start_a_stop_string_is_held_back(stops, text):
    matcher, out = StopStrings(stops), ""
    for character in text:
        emitted, stopped = matcher.feed(character)
        out += emitted
        if stopped:
            return
    held = matcher.flush()
    assert out + held == text
    assert held == "" or any(stop.startswith(held) for stop in stops)


def test_text_streams_through_and_the_tail_is_released_at_the_end():
    matcher = StopStrings(["\n\n", "END"])
    assert matcher.feed("one\n") == ("one", False)
    assert matcher.feed("two E") == ("\ntwo ", False)
    assert matcher.feed("N") == ("", False)
    assert matcher.flush() == "EN"


def test_a_stop_string_across_deltas_ends_the_text_before_it():
    matcher = StopStrings(["END"])
    assert matcher.feed("text E") == ("text ", False)
    assert matcher.feed("ND more") == ("", True)
    assert matcher.matched == "END"
    assert matcher.feed("dropped") == ("", True)
    assert matcher.flush() == ""


def test_without_stop_strings_everything_passes():
    assert stream([], ["any", "thing"]) == ("anything", False, None)


def test_an_empty_stop_string_is_refused():
    with pytest.raises(RequestError, match="empty"):
        StopStrings(["END", ""])


def test_characters_beyond_ascii_match_as_text():
    assert stream(["。終"], ["これ。", "終わり"]) == ("これ", True, "。終")
