"""Chains under a grammar, against trying every token with a matcher of one's own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dspark_backend.errors import GrammarError
from dspark_backend.grammar import bitmask
from dspark_backend.grammar.compile import Grammar
from dspark_backend.grammar.matcher import Matcher
from dspark_backend.speculation.block import FORCED, Offer, constrained
from dspark_backend.speculation.distribution import Distribution
from dspark_backend.speculation.guide import ChainGuide, Likeliest, Slot
from dspark_backend.speculation.protocol import Proposal
from dspark_backend.speculation.trail import Trail
from dspark_backend.speculation.vocabulary import DraftVocabulary

VOCAB = 512
Lark = Callable[[str], Grammar]
SOURCES = {
    "words": 'start: /[a-z]{2,5}/ " with number " /[0-9]{1,3}/ ", then stop."',
    "choice": 'start: ("red" | "read" | "blue") " " ("one" | "two")',
    "call": 'start: "{\\"name\\": \\"" ("add" | "main") "\\", \\"line\\": " /[0-9]+/ "}"',
}


def vocabulary(seed: int, size: int) -> DraftVocabulary:
    ids = np.random.default_rng(seed).choice(VOCAB, size, replace=False)
    return DraftVocabulary(np.sort(ids).astype(np.int64))


def legal_ids(matcher: Matcher) -> list[int]:
    """Every token, tried."""
    return [token for token in range(VOCAB) if matcher.fork().accepts_prefix([token])]


def brute_force(
    matcher: Matcher, logits: np.ndarray, spoken: list[int], canonical: bool
) -> Slot | None:
    """What the next slot holds, in float64."""
    if matcher.is_terminated and matcher.accepted:
        return None
    span = matcher.forced() if canonical else []
    if span:
        return Slot(span[0], 1.0, 1, True)
    legal = legal_ids(matcher)
    if len(legal) == 1:
        return Slot(legal[0], 1.0, 1)
    said = {token: float(logits[i]) for i, token in enumerate(spoken) if token in legal}
    if not said:
        return None
    best = max(said, key=lambda token: (said[token], -token))
    weights = np.exp(logits.astype(np.float64))
    mass = sum(np.exp(value) for value in said.values()) / weights.sum()
    return Slot(best, float(mass), len(legal))


@pytest.mark.parametrize("canonical", [True, False])
@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("size", [VOCAB, 300, 60])
def test_a_chain_is_what_trying_every_token_gives(
    source: str, size: int, canonical: bool, lark: Lark
) -> None:
    grammar, slots = lark(source), 0
    for seed in range(6):
        spoken = vocabulary(seed, size)
        rng = np.random.default_rng(seed)
        own = grammar.matcher(canonical=canonical)
        trail = Trail(grammar.matcher(canonical=canonical), canonical=canonical)
        guide = ChainGuide(trail, 30, Likeliest())
        for _ in range(30):
            logits = (3 * rng.standard_normal(size)).astype(np.float32)
            expected = brute_force(own, logits, spoken.ids.tolist(), canonical)
            slot = guide.choose(logits, spoken)
            if expected is None or slot is None:
                assert slot is expected
                break
            assert (slot.token, slot.mask_width, slot.forced) == (
                expected.token,
                expected.mask_width,
                expected.forced,
            )
            assert slot.legal_mass == pytest.approx(expected.legal_mass, rel=1e-5)
            own.accept([slot.token])
            slots += 1
    assert slots > (10 if size > 60 else 0)


@pytest.mark.parametrize("canonical", [True, False])
@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_what_is_foreseen_is_what_any_logits_give(source: str, canonical: bool, lark: Lark) -> None:
    grammar, spoken, foreseen = lark(source), vocabulary(0, VOCAB), 0
    rng = np.random.default_rng(0)
    trail = Trail(grammar.matcher(canonical=canonical), canonical=canonical)
    guide, path = ChainGuide(trail, 12, Likeliest()), list[int]()
    while True:
        ahead = guide.foresee(5)
        assert guide.foresee(2).tokens == ahead.tokens[:2]
        assert len(ahead.tokens) <= 5
        for token in ahead.tokens:
            slot = guide.choose(np.empty(0, np.float32), spoken)
            assert slot is not None
            assert (slot.token, slot.mask_width) == (token, 1)
            path.append(token)
        foreseen += len(ahead.tokens)
        if len(ahead.tokens) == 5:
            continue
        slot = guide.choose(rng.standard_normal(VOCAB).astype(np.float32), spoken)
        assert ahead.ended == (slot is None)
        if slot is None:
            break
        assert ahead.mask is not None
        assert torch.equal(ahead.mask, trail.mask(path))
        path.append(slot.token)
    assert len(path) == 12 or trail.over(path)
    assert foreseen > 0 or not canonical


def test_room_ends_a_chain(lark: Lark) -> None:
    guide = ChainGuide(Trail(lark(SOURCES["words"]).matcher(), canonical=True), 2, Likeliest())
    spoken, logits = vocabulary(0, VOCAB), np.zeros(VOCAB, np.float32)
    chain = [guide.choose(logits, spoken) for _ in range(3)]
    assert [slot is None for slot in chain] == [False, False, True]


def test_a_grammar_that_dies_ends_the_chain_and_kills_the_step_where_it_gets_there(
    lark: Lark, monkeypatch: pytest.MonkeyPatch
) -> None:
    trail = Trail(lark("start: /[a-z]{9}/").matcher(), canonical=True)
    guide = ChainGuide(trail, 9, Likeliest())
    spoken, logits = vocabulary(0, VOCAB), np.zeros(VOCAB, np.float32)
    alive = guide.choose(logits, spoken)
    assert alive is not None
    fill = Matcher.fill_mask

    def dying(self: Matcher, row: torch.Tensor) -> None:
        if self.accepted:
            raise GrammarError("the grammar died in the turn")
        fill(self, row)

    monkeypatch.setattr(Matcher, "fill_mask", dying)
    assert guide.choose(logits, spoken) is None
    with pytest.raises(GrammarError, match="died"):
        constrained(trail, offer([alive.token]), room=9)


def offer(drafts: Sequence[int], distributions: tuple[Distribution | None, ...] = ()) -> Offer:
    survival = tuple(0.9 ** (k + 1) for k in range(len(drafts)))
    return Offer.as_said(Proposal(tuple(drafts), survival, "script", distributions=distributions))


@pytest.mark.parametrize("canonical", [True, False])
@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_no_mask_is_filled_twice_for_one_place(
    source: str, canonical: bool, lark: Lark, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled: list[int] = []
    fill = Matcher.fill_mask

    def counted(self: Matcher, row: torch.Tensor) -> None:
        filled.append(self.accepted)
        fill(self, row)

    trail = Trail(lark(source).matcher(canonical=canonical), canonical=canonical)
    monkeypatch.setattr(Matcher, "fill_mask", counted)
    constrained(trail, None, room=9)
    guide, spoken = ChainGuide(trail, 9, Likeliest()), vocabulary(1, VOCAB)
    rng = np.random.default_rng(4)
    chain = [guide.choose(rng.standard_normal(VOCAB).astype(np.float32), spoken) for _ in range(6)]
    drafts = [slot.token for slot in chain if slot is not None]
    block = constrained(trail, offer(drafts), room=9)
    assert list(block.tokens[: len(drafts)]) == drafts
    assert len(filled) == len(set(filled)) > 1


@pytest.mark.parametrize("canonical", [True, False])
def test_a_trail_answers_for_any_path_in_any_order(canonical: bool, lark: Lark) -> None:
    grammar = lark(SOURCES["call"])
    trail = Trail(grammar.matcher(canonical=canonical), canonical=canonical)
    rng = np.random.default_rng(2)
    committed: list[int] = []
    for _ in range(4):
        paths: list[list[int]] = [[]]
        for _ in range(12):
            path = list(paths[rng.integers(len(paths))])
            fresh = grammar.matcher(canonical=canonical)
            fresh.accept(committed + path)
            if not fresh.is_terminated:
                paths.append([*path, int(rng.choice(legal_ids(fresh)))])
        for index in rng.permutation(2 * len(paths)) % len(paths):
            path = paths[index]
            fresh = grammar.matcher(canonical=canonical)
            fresh.accept(committed + path)
            assert trail.over(path) == fresh.is_terminated
            assert list(trail.forced(path)) == fresh.forced()
            assert trail.span(path) == (trail.forced(path) if canonical else ())
            if fresh.accepted == 0 or not fresh.is_terminated:
                mask = torch.zeros(fresh.words, dtype=torch.int32)
                fresh.fill_mask(mask)
                assert torch.equal(trail.mask(path), mask)
                assert trail.width(path) == bitmask.width(mask)
        longest = max(paths, key=len)
        trail.commit(longest)
        committed += longest


def test_what_is_not_legal_cannot_be_committed(lark: Lark) -> None:
    trail = Trail(lark('start: "abc"').matcher(), canonical=False)
    with pytest.raises(GrammarError, match="not legal"):
        trail.commit([VOCAB - 1])


def test_an_illegal_draft_ends_the_block_before_it_or_with_it(lark: Lark) -> None:
    """Before it where it was certain, with it where it was drawn: it has to be rejected then."""
    grammar = lark("start: /[a-z]{4}/")
    legal = legal_ids(grammar.matcher())[:2]
    (illegal,) = itertools.islice(set(range(VOCAB)) - set(legal_ids(grammar.matcher())), 1)
    half = Distribution(np.array([1, 2], np.uint32), np.array([0.5, 0.5]))
    drafts = [legal[0], illegal, legal[1]]
    trail = Trail(grammar.matcher(), canonical=True)
    certain = constrained(trail, offer(drafts), room=9)
    assert certain.tokens == (legal[0],)
    assert certain.distributions == ()
    assert certain.refused == (0, 1)
    drawn = constrained(trail, offer(drafts, (half,) * 3), room=9)
    assert drawn.tokens == (legal[0], illegal)
    assert drawn.distributions == (half, half)
    assert drawn.masks is not None
    assert [mask is None for mask in drawn.masks] == [False, False, True]


def test_forced_tokens_between_drafts_are_certain(lark: Lark) -> None:
    grammar = lark('start: ("red" | "blue") " is a colour"')
    matcher = grammar.matcher()
    first = legal_ids(matcher)[0]
    matcher.accept([first])
    span = matcher.forced()
    q = Distribution(np.array([first], np.uint32), np.ones(1))
    trail = Trail(grammar.matcher(), canonical=True)
    block = constrained(trail, offer([first, 7], (q, q)), room=20)
    assert block.sources[: 1 + len(span)] == ("script", *[FORCED] * len(span))
    assert block.distributions[0] is q
    assert not any(block.distributions[1:])
    assert block.survival == (block.survival[0],) * len(block.tokens)


@given(st.floats(0.001, 0.999), st.floats(1e-6, 1.0), st.integers(2, 1000))
def test_confidence_moves_by_the_log_of_the_legal_mass(c: float, mass: float, width: int) -> None:
    moved = Slot(5, mass, width).confidence(c)
    assert np.log(moved / (1 - moved)) == pytest.approx(np.log(c / (1 - c)) + np.log(mass))
    assert moved <= c * (1 + 1e-12)
    assert Slot(5, mass, 1).confidence(c) == 1.0
    assert Slot(5).confidence(c) == pytest.approx(c)
    assert Slot(5, mass, width).confidence(1.0) == 1.0


@given(st.sets(st.integers(0, 95), min_size=1), st.sets(st.integers(0, 95), min_size=1))
def test_a_mask_is_read_at_the_draft_vocabularys_places(
    allowed: set[int], spoken: set[int]
) -> None:
    mask = torch.zeros(3, dtype=torch.int32)
    for token in allowed:
        mask |= bitmask.only(token, 3)
    ids = sorted(spoken)
    drafts = DraftVocabulary(np.array(ids, np.int64))
    assert [ids[i] for i in drafts.legal(mask)] == sorted(spoken & allowed)
    assert bitmask.width(mask) == len(allowed)
    assert bitmask.sole(mask) == min(allowed)
    assert {v for v in range(100) if bitmask.is_allowed(mask, v)} == allowed
    row = drafts.spread(np.arange(len(ids), dtype=np.float32), 96)
    assert {v for v in range(96) if row[v] > -np.inf} == spoken
