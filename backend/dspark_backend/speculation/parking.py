"""Whether drafting pays at all, decided before it is paid for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from dspark_backend.speculation.admission import PassSeconds, draft_seconds
from dspark_backend.speculation.candidate import Candidate, CycleCost

_PRICES: Final = 24
"""Most prices tried, so that hundreds of requests are decided in milliseconds."""


def worth_drafting(expected: Sequence[Candidate], cost: CycleCost) -> list[bool]:
    """For which of ``expected`` to call the drafter; the others decode plainly in the same pass.

    ``expected`` holds a candidate for every request of the pass, with the survivals that a draft
    would have on average (empty where there is nothing to draft). The subset maximises weighted
    expected tokens over seconds of drafting and verifying. For a price of a row in tokens, the
    best m requests are those whose drafts earn the most above it (Everett 1963); all m and up to
    24 prices are tried. Never worse by its own account than drafting for nobody.

    Raises BudgetError where the cost is no possible time.
    """
    if not expected:
        return []
    base = sum(each.weight for each in expected)
    values = [_values(each) for each in expected]
    seconds = PassSeconds(expected, cost)
    best_rate = base / seconds(0)
    chosen: list[int] = []
    for price in _prices(values):
        offers = _offers(values, price)
        gain, rows = base, 0
        for count, (surplus, taken, request) in enumerate(offers, start=1):
            gain += surplus + price * taken
            rows += taken
            rate = gain / (draft_seconds(count, cost) + seconds(rows))
            if rate > best_rate:
                best_rate = rate
                chosen = [request for _, _, request in offers[:count]]
    drafts = set(chosen)
    return [i in drafts for i in range(len(expected))]


def _values(each: Candidate) -> list[float]:
    return [each.weight * each.survival[k] for k in range(each.certain, each.most)]


def _prices(values: Sequence[Sequence[float]]) -> Iterator[float]:
    """0, where every draft is verified, and the values at which one draft more drops out."""
    yield 0.0
    distinct = sorted({value for each in values for value in each if value > 0.0})
    step = max(1, -(-len(distinct) // (_PRICES - 1)))
    yield from distinct[::step]


def _offers(values: Sequence[Sequence[float]], price: float) -> list[tuple[float, int, int]]:
    """Every request with drafts worth more than ``price``: what they earn above it, how many they
    are, which request; the best offer first."""
    offers = []
    for request, each in enumerate(values):
        taken = 0
        while taken < len(each) and each[taken] > price:
            taken += 1
        if taken:
            offers.append((sum(each[:taken]) - price * taken, taken, request))
    offers.sort(key=lambda offer: (-offer[0], offer[2]))
    return offers
