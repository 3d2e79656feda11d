"""The block of a pass: what was offered, how surely, and what a verification says of each offer."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from dspark_backend.speculation.block import Block, Offer, unconstrained
from dspark_backend.speculation.protocol import Proposal


def offer(tokens: Sequence[int], sure: float = 0.9, source: str = "draft") -> Offer:
    survival = tuple(sure ** (k + 1) for k in range(len(tokens)))
    return Offer.as_said(Proposal(tuple(tokens), survival, source))


def spliced(room: int = 20, tail: Sequence[int] = (7, 8, 9)) -> Block:
    """Two drafts, then one copy of three, then nothing."""

    def extend(tokens: Sequence[int]) -> Offer | None:
        return offer(tail, 0.5, "copy") if tuple(tokens) == (1, 2) and tail else None

    return unconstrained(offer([1, 2]), room=room, extend=extend)


def test_a_block_goes_on_where_its_drafts_end() -> None:
    block = spliced()
    assert block.tokens == (1, 2, 7, 8, 9)
    assert block.sources == ("draft",) * 2 + ("copy",) * 3
    assert block.survival == pytest.approx((0.9, 0.81, 0.405, 0.2025, 0.10125))
    assert block.origins == ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2))


@pytest.mark.parametrize("room", range(6))
def test_room_bounds_a_block(room: int) -> None:
    assert len(spliced(room).tokens) == min(room, 5)


def test_what_is_hardly_ever_reached_is_not_looked_at() -> None:
    def extend(tokens: Sequence[int]) -> Offer:
        return offer([len(tokens)], 0.5, "copy")

    block = unconstrained(offer([1]), room=40, extend=extend)
    assert len(block.tokens) == 4  # 0.9, 0.45, 0.225, 0.1125, and 0.056 is below the floor


@pytest.mark.parametrize("accepted", range(6))
def test_each_offer_learns_how_far_it_was_right(accepted: int) -> None:
    judged = [(o.proposal.source, held, seen) for o, held, seen in spliced().judged(accepted)]
    expected = {
        0: [("draft", 0, 1)],
        1: [("draft", 1, 2)],
        2: [("draft", 2, 2), ("copy", 0, 1)],
        3: [("draft", 2, 2), ("copy", 1, 2)],
        4: [("draft", 2, 2), ("copy", 2, 3)],
        5: [("draft", 2, 2), ("copy", 3, 3)],
    }
    assert judged == expected[accepted]


@pytest.mark.parametrize("length", range(6))
def test_what_the_budget_cut_says_nothing(length: int) -> None:
    """A draft that was not verified is neither right nor wrong."""
    block = spliced().first(length)
    assert len(block.tokens) == len(block.survival) == len(block.origins) == length
    seen = {o.proposal.source: (held, n) for o, held, n in block.judged(length)}
    assert seen.get("draft", (0, 0)) == (min(length, 2), min(length, 2))
    assert seen.get("copy", (0, 0)) == (max(length - 2, 0), max(length - 2, 0))
