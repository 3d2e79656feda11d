"""Whether drafting pays at all, decided before it is paid for."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Final, NamedTuple

from dspark_backend.speculation.admission import PassSeconds, draft_seconds
from dspark_backend.speculation.candidate import Candidate, CycleCost

_PRICES: Final = 16
"""Most prices tried, so that hundreds of requests are decided in milliseconds."""


def worth_drafting(expected: Sequence[Candidate], cost: CycleCost) -> list[bool]:
    """For which of ``expected`` to call the drafter; the others decode plainly in the same pass.

    ``expected`` holds a candidate for every request of the pass, with the survivals that a draft
    would have on average (empty where there is nothing to draft). The subset maximises weighted
    expected tokens over seconds of drafting and verifying. For a price of a row in tokens, the
    best m requests are those whose drafts earn the most above it (Everett 1963); all m and up to
    16 prices are tried. Never worse by its own account than drafting for nobody.

    Raises BudgetError where the cost is no possible time.
    """
    if not expected:
        return []
    base = sum(each.weight for each in expected)
    drafts = [found for i, each in enumerate(expected) if (found := _drafts(each, i)) is not None]
    seconds = PassSeconds(expected, cost)
    drafting = [draft_seconds(count, cost) for count in range(len(drafts) + 1)]
    best_rate = base / seconds(0)
    chosen: list[int] = []
    for price in _prices(drafts):
        offers = _offers(drafts, price)
        gain, rows = base, 0
        for count, (surplus, taken, _) in enumerate(offers, start=1):
            gain += surplus + price * taken
            rows += taken
            rate = gain / (drafting[count] + seconds(rows))
            if rate > best_rate:
                best_rate = rate
                chosen = [request for _, _, request in offers[:count]]
    worth = set(chosen)
    return [i in worth for i in range(len(expected))]


class _Drafts(NamedTuple):
    """What a request's drafts are worth: minus each value (ascending), and their running sum."""

    request: int
    negative: list[float]
    gains: list[float]


def _drafts(each: Candidate, request: int) -> _Drafts | None:
    values = [each.weight * value for value in each.survival[each.certain : each.most]]
    if not values or values[0] <= 0.0:
        return None
    return _Drafts(request, [-value for value in values], list(accumulate(values)))


def _prices(drafts: Sequence[_Drafts]) -> Iterator[float]:
    """0, where every draft is verified, and the values at which one draft more drops out."""
    yield 0.0
    distinct = sorted({-value for each in drafts for value in each.negative if value < 0.0})
    step = max(1, -(-len(distinct) // (_PRICES - 1)))
    yield from distinct[::step]


def _offers(drafts: Sequence[_Drafts], price: float) -> list[tuple[float, int, int]]:
    """Every request with drafts worth more than ``price``: what they earn above it, how many they
    are, which request; the best offer first."""
    offers = []
    for request, negative, gains in drafts:
        taken = bisect_left(negative, -price)
        if taken:
            offers.append((gains[taken - 1] - price * taken, taken, request))
    offers.sort(key=lambda offer: (-offer[0], offer[2]))
    return offers
