"""The order in which drafts are admitted to a pass, and what the pass then costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from dspark_backend.speculation.candidate import BudgetError, Candidate, CycleCost


class Draft(NamedTuple):
    """A proposed token that may be admitted: ``value`` is the expected tokens that it adds to the
    pass, weighted or not, and ``request`` the index of its candidate."""

    value: float
    request: int


def by_value(candidates: Sequence[Candidate], *, weighted: bool) -> list[Draft]:
    """All drafts that may be admitted, the most valuable first.

    Within a request values never rise, so any prefix of this list is a prefix of every proposal,
    and among all choices of n drafts the first n have the largest sum. Ties go to the earlier
    position, then to the earlier request: never by anything that knows a token.
    """
    found = []
    for request, each in enumerate(candidates):
        weight = each.weight if weighted else 1.0
        for k in range(each.certain, each.most):
            found.append((-weight * each.survival[k], k, request))
    found.sort()
    return [Draft(-negative, request) for negative, _, request in found]


def lengths_of(candidates: Sequence[Candidate], admitted: Sequence[Draft]) -> list[int]:
    """Lengths where the certain tokens and ``admitted`` are verified."""
    lengths = [each.certain for each in candidates]
    for draft in admitted:
        lengths[draft.request] += 1
    return lengths


def anchors(candidates: Sequence[Candidate]) -> int:
    """Requests whose proposals came out of the drafter's call."""
    return sum(each.drafted and bool(each.survival) for each in candidates)


class PassSeconds:
    """``seconds(n)``: the pass with every certain token and n drafts on top, asked once each.

    Raises BudgetError where the cost is not a positive, finite time.
    """

    def __init__(self, candidates: Sequence[Candidate], cost: CycleCost) -> None:
        self._rows = sum(each.base_rows + each.certain for each in candidates)
        self._requests = len(candidates)
        self._context = sum(each.context for each in candidates)
        self._cost = cost
        self._known: list[float] = []

    def __call__(self, drafts: int) -> float:
        while len(self._known) <= drafts:
            rows = self._rows + len(self._known)
            seconds = self._cost.verify_s(rows, self._requests, self._context)
            if not (seconds > 0.0 and math.isfinite(seconds)):
                raise BudgetError(f"a pass of {rows} rows cannot take {seconds} s: measure again")
            self._known.append(seconds)
        return self._known[drafts]


def draft_seconds(anchors: int, cost: CycleCost) -> float:
    """``cost.draft_s``; nothing for no anchors. Raises BudgetError for what is no possible time."""
    if not anchors:
        return 0.0
    seconds = cost.draft_s(anchors)
    if not (seconds >= 0.0 and math.isfinite(seconds)):
        raise BudgetError(f"drafting for {anchors} anchors cannot take {seconds} s: measure again")
    return seconds
