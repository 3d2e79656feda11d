"""What a corpus remembers, what it forgets, and that it stays as small as it says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_backend.errors import RequestError
from dspark_backend.speculation.corpus import Corpora, Corpus
from dspark_backend.speculation.suffix import SuffixIndex

LIMIT = 24
untimed = settings(deadline=None)  # the first call may compile

documents = st.lists(st.lists(st.integers(0, 3), max_size=30), max_size=25)


def held(corpus: Corpus) -> list[list[int]]:
    """The documents that a search can still reach."""
    parts: list[list[int]] = []
    for token in corpus.index.tokens[corpus.index._floor :].tolist():
        if token < 0:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


@untimed
@given(documents)
def test_the_most_recent_documents_are_held(added: list[list[int]]) -> None:
    corpus = Corpus(LIMIT)
    expected: list[list[int]] = []
    for document in added:
        corpus.add(document)
        kept = document[-LIMIT:]
        if kept and kept not in expected:
            while sum(map(len, expected)) + len(kept) > LIMIT:
                expected.pop(0)
            expected.append(kept)
        assert held(corpus) == expected
        assert corpus.held_tokens == sum(map(len, expected)) <= LIMIT
        assert len(corpus.index) <= 3 * LIMIT + 1


@untimed
@given(documents, st.lists(st.integers(0, 3), max_size=12))
def test_searching_it_is_searching_what_is_held(added: list[list[int]], log: list[int]) -> None:
    corpus = Corpus(LIMIT)
    for document in added:
        corpus.add(document)
    fresh = SuffixIndex()
    for document in held(corpus):
        fresh.border()
        fresh.append(document)
    index = SuffixIndex()
    index.append(log)
    found, expected = index.match_in(corpus.index), index.match_in(fresh)
    assert found.length == expected.length
    moved = len(corpus.index) - len(fresh)
    assert found.ends == tuple(end + moved for end in expected.ends)
    assert corpus.index.follow(found, 32, extend=False) == fresh.follow(expected, 32, extend=False)


def test_it_stays_small_however_much_is_added() -> None:
    corpus = Corpus(1000)
    tokens = np.random.default_rng(2).integers(0, 5000, (400, 90)).tolist()
    for document in tokens:
        corpus.add(document)
    assert held(corpus) == tokens[-11:]
    assert len(corpus.index) <= 3000
    assert len(corpus.index._last) <= 3000


def test_agents_have_their_own_and_the_one_unasked_for_goes() -> None:
    corpora = Corpora(limit_tokens=10, agents=2)
    first = corpora.of("first")
    first.add([1, 2, 3])
    assert corpora.of("second") is not first
    assert corpora.of("first") is first
    corpora.of("third")
    assert len(corpora) == 2
    assert corpora.of("first") is first
    assert corpora.of("second").held_tokens == 0
    assert first.held_tokens == 3


def test_bad_limits_and_ids_are_refused() -> None:
    with pytest.raises(RequestError, match="at least 1 token, not 0"):
        Corpora(limit_tokens=0, agents=1)
    with pytest.raises(RequestError, match="at least 1 agent, not 0"):
        Corpora(limit_tokens=1, agents=0)
    corpus = Corpus(4)
    with pytest.raises(RequestError, match="at least 0, not -2"):
        corpus.add([-2, 1, 1, 1, 1])
    assert held(corpus) == []
