"""The suffix index against brute force: matches, majorities, rollback, forks, bounded work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_backend.errors import RequestError
from dspark_backend.speculation.suffix import VOTERS, Continuation, SuffixIndex

LIMIT = 32
untimed = settings(deadline=None)  # the first call may compile


def texts(letters: int, longest: int = 60) -> st.SearchStrategy[list[int]]:
    """Few letters make many overlaps."""
    return st.lists(st.integers(0, letters - 1), max_size=longest)


@st.composite
def periodic(draw: st.DrawFn) -> list[int]:
    period = draw(st.lists(st.integers(0, 2), min_size=1, max_size=5))
    return draw(texts(3, 8)) + period * draw(st.integers(1, 12)) + draw(texts(3, 3))


any_text = st.one_of(texts(1), texts(2), texts(3), texts(8), periodic())


def indexed(tokens: Sequence[int]) -> SuffixIndex:
    index = SuffixIndex()
    index.append(tokens)
    return index


def documents(*parts: Sequence[int]) -> SuffixIndex:
    index = SuffixIndex()
    for part in parts:
        index.border()
        index.append(part)
    return index


def brute_match(log: Sequence[int], text: Sequence[int], last: int) -> tuple[int, tuple[int, ...]]:
    """By definition: of all positions up to ``last``, those that end like the log the longest."""
    extents = {}
    for j in range(last + 1):
        length = 0
        while length < min(len(log), j + 1) and text[j - length] == log[-1 - length]:
            length += 1
        if j + 1 < len(text) and text[j + 1] >= 0:
            extents[j] = length
    best = max(extents.values(), default=0)
    ends = [j for j, length in extents.items() if length == best] if best else []
    return best, tuple(reversed(ends))


def brute_follow(text: Sequence[int], ends: Sequence[int], limit: int, own: bool) -> Continuation:
    """Sources that go on one token at a time; the majority is also what the text goes on with."""
    grown, alive = list(text), list(ends)
    tokens, votes, voters = [], [], []
    for k in range(limit):
        alive = [e for e in alive if e + 1 + k < len(grown) and grown[e + 1 + k] >= 0]
        if not alive:
            break
        counts = Counter(grown[e + 1 + k] for e in alive)  # first seen, hence most recent, wins
        token, most = max(counts.items(), key=lambda item: item[1])
        tokens.append(token)
        votes.append(most)
        voters.append(len(alive))
        alive = [e for e in alive if grown[e + 1 + k] == token]
        if own:
            grown.append(token)
    return Continuation(tuple(tokens), tuple(votes), tuple(voters))


def same(a: SuffixIndex, b: SuffixIndex) -> bool:
    """Equal in everything that later calls look at."""
    return (
        np.array_equal(a.tokens, b.tokens)
        and np.array_equal(a._previous[: len(a)], b._previous[: len(b)])
        and a._last == b._last
        and a.match() == b.match()
    )


@untimed
@given(any_text)
def test_longest_match_is_that_of_brute_force(log: list[int]) -> None:
    found = indexed(log).match()
    length, ends = brute_match(log, log, len(log) - 2)
    assert (found.length, found.ends) == (length, ends[:VOTERS])


@untimed
@given(any_text, st.lists(any_text, max_size=4))
def test_longest_match_elsewhere_stays_inside_a_document(
    log: list[int], others: list[list[int]]
) -> None:
    index = documents(*others)
    found = indexed(log).match_in(index)
    text = index.tokens.tolist()
    length, ends = brute_match(log, text, len(text) - 1) if log else (0, ())
    assert (found.length, found.ends) == (length, ends[:VOTERS])
    if found.ends:
        told = index.follow(found, LIMIT, extend=False)
        assert told == brute_follow(text, ends[:VOTERS], LIMIT, own=False)
        assert all(token >= 0 for token in told.tokens)


@untimed
@given(any_text, st.integers(0, LIMIT))
def test_majorities_are_those_of_brute_force(log: list[int], limit: int) -> None:
    index = indexed(log)
    match = index.match()
    assert index.follow(match, limit, extend=True) == brute_follow(log, match.ends, limit, own=True)


@untimed
@given(any_text, st.data())
def test_truncating_equals_rebuilding(log: list[int], data: st.DataObject) -> None:
    kept = data.draw(st.integers(0, len(log)))
    more = data.draw(texts(3))
    index = indexed(log)
    index.truncate(kept)
    assert same(index, indexed(log[:kept]))
    index.append(more)
    assert same(index, indexed(log[:kept] + more))


@untimed
@given(st.lists(texts(3, 10), max_size=6))
def test_how_a_text_is_cut_when_appended_changes_nothing(parts: list[list[int]]) -> None:
    index = SuffixIndex()
    for part in parts:
        index.append(part)
        index.match()
    assert same(index, indexed([token for part in parts for token in part]))


@untimed
@given(periodic(), periodic(), st.booleans(), st.data())
def test_a_search_elsewhere_does_not_look_at_an_old_log(
    log: list[int], more: list[int], grows: bool, data: st.DataObject
) -> None:
    other = documents(log + more, more + more)
    index = indexed([*log, 9])
    index.match()
    now = [*log, 9, *more] if grows else log[: data.draw(st.integers(0, len(log)))]
    if grows:
        index.append(more)
    else:
        index.truncate(len(now))
    assert index.match_in(other) == indexed(now).match_in(other)


@untimed
@given(any_text, texts(3), texts(3))
def test_forks_go_separate_ways(log: list[int], left: list[int], right: list[int]) -> None:
    parent = indexed(log)
    child = parent.fork()
    parent.append(left)
    child.append(right)
    assert same(parent, indexed(log + left))
    assert same(child, indexed(log + right))
    parent.truncate(0)
    assert same(child, indexed(log + right))


@untimed
@given(st.lists(any_text, min_size=1, max_size=4), any_text, st.data())
def test_nothing_before_the_floor_is_matched(
    others: list[list[int]], log: list[int], data: st.DataObject
) -> None:
    forgotten = data.draw(st.integers(0, len(others)))
    index = documents(*others)
    index.forget_before(sum(len(part) + 1 for part in others[:forgotten]))
    found = indexed(log).match_in(index)
    expected = indexed(log).match_in(documents(*others[forgotten:]))
    shift = len(index) - sum(len(part) + 1 for part in others[forgotten:])
    assert found.length == expected.length
    assert found.ends == tuple(end + shift for end in expected.ends)


def test_a_text_matches_neither_nothing_nor_itself() -> None:
    assert indexed([]).match().ends == ()
    assert indexed([7]).match().ends == ()
    assert indexed([1, 2, 3]).match().ends == ()
    assert indexed([]).match_in(indexed([1, 2])).ends == ()
    assert indexed([1]).match_in(indexed([])).ends == ()
    nothing = indexed([7])
    assert nothing.follow(nothing.match(), LIMIT, extend=True) == Continuation()


def test_the_end_of_a_document_is_no_match() -> None:
    """Nothing can be copied from there, so the shorter match that goes on is the longest."""
    index = documents([5, 1, 2, 3], [9, 3, 4])
    found = indexed([1, 2, 3]).match_in(index)
    assert (found.length, found.ends) == (1, (7,))
    assert index.follow(found, LIMIT, extend=False).tokens == (4,)


def test_a_period_continues_through_the_overlap() -> None:
    log = [9, 1, 2, 3, 1, 2, 3, 1]
    index = indexed(log)
    match = index.match()
    assert (match.length, match.ends) == (4, (4,))
    assert index.follow(match, LIMIT, extend=True).tokens == ((2, 3, 1) * 11)[:LIMIT]
    assert index.follow(match, LIMIT, extend=False).tokens == (2, 3, 1)


def test_only_the_most_recent_occurrences_vote() -> None:
    index = indexed([token for k in range(VOTERS + 8) for token in (1, 10 + k)] + [1])
    match = index.match()
    assert (match.length, len(match.ends)) == (1, VOTERS)
    assert match.ends[0] == 2 * (VOTERS + 7)
    told = index.follow(match, 1, extend=True)
    assert (told.tokens, told.votes, told.voters) == ((10 + VOTERS + 7,), (1,), (VOTERS,))


@pytest.mark.parametrize(
    "log",
    [
        [3] * 8192,
        [1, 2, 3, 1, 2, 4] * 1365,
        [1] * 4096 + [2] + [1] * 4095,
        ([1, 2] * 40 + [3]) * 101,
        np.random.default_rng(4).integers(0, 2, 8192).tolist(),
        np.random.default_rng(5).integers(0, 2000, 8192).tolist(),
    ],
    ids=["one token", "period", "two runs", "nested periods", "two letters", "wide"],
)
def test_a_search_takes_at_most_three_operations_a_token(log: list[int]) -> None:
    index = indexed(log)
    assert index.match().operations <= 3 * len(log)
    other = documents(log[1000:], log[:1000], log)
    assert index.match_in(other).operations <= 3 * len(other)


def test_a_search_visits_the_occurrences_of_the_last_token_alone() -> None:
    log = np.random.default_rng(6).integers(0, 2000, 8192).tolist()
    index = indexed(log)
    occurrences = log.count(log[-1])
    assert index.match().operations <= 3 * occurrences < 60


def test_negative_ids_and_impossible_lengths_are_refused_and_change_nothing() -> None:
    index = indexed([1, 2, 1])
    with pytest.raises(RequestError, match="at least 0, not -1"):
        index.append([4, -1])
    with pytest.raises(RequestError, match="truncate a suffix index to 4 tokens: it holds 3"):
        index.truncate(4)
    with pytest.raises(RequestError, match="to -1 tokens"):
        index.truncate(-1)
    assert same(index, indexed([1, 2, 1]))
