"""Token counts for the penalties: a stack over a fixed log."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_backend.sampling.counts import TokenCounts

tokens = st.integers(0, 12)


def table(counts):
    assert len(set(counts.ids.tolist())) == len(counts.ids)
    return dict(zip(counts.ids.tolist(), counts.counts.tolist(), strict=True))


@given(st.lists(tokens), st.lists(tokens | st.none(), max_size=60))
def test_pushes_and_pops_agree_with_a_recount(log, steps):
    counts, output = TokenCounts(log), []
    for step in steps:
        if step is None and output:
            output.pop()
            counts.pop()
        elif step is not None:
            output.append(step)
            counts.push(step)
        tally = Counter(output)
        assert table(counts) == {token: tally[token] for token in {*log, *output}}


def test_room_grows_with_the_output():
    counts = TokenCounts([1])
    for token in range(1000):
        counts.push(token)
    assert table(counts) == dict.fromkeys(range(1000), 1.0)


def test_popping_nothing_is_an_error():
    with pytest.raises(IndexError):
        TokenCounts([1, 2]).pop()
