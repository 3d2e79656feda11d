"""Our budget: the most weighted tokens a second of the whole cycle, the draft's time included."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from dspark_backend.speculation.admission import (
    Draft,
    PassSeconds,
    anchors,
    by_value,
    draft_seconds,
    lengths_of,
)
from dspark_backend.speculation.candidate import BudgetError, Candidate, CycleCost


@dataclass(frozen=True, slots=True)
class StepAware:
    """Maximises G(l) / (draft_s + verify_s(l)), where G(l) is the sum over requests of weight
    times (1 + the survivals of the drafts verified).

    ``anticipating`` looks at all survivals and finds the global optimum over the curve, whatever
    its shape, as long as the cost of a pass depends on the drafts through their number alone:
    for every number the first ones by weighted survival have the largest sum. Exact for
    deterministic drafts and for coupled sampling.

    Otherwise (sampled drafts with rejection sampling) drafts are admitted one by one, and whether
    one is admitted depends on nothing that knows its token: on no survival behind it in its own
    proposal, nor behind any other draft not yet admitted (DSPARK.md, section 6). Where the next
    draft alone does not pay, it is admitted if the next ``horizon`` would together, were every
    proposal of ``block_size`` drafts to go on as surely as its last draft did. Caps and weights
    must know no drafted token either; the end of a proposal may.

    Where plain decoding beats the cycle even at its best, the time of the draft is lost already:
    a draft is then verified only if it pays at the rate of plain decoding.

    Raises BudgetError for a block or a horizon of no drafts.
    """

    parks: ClassVar[bool] = True

    anticipating: bool = True
    block_size: int = 8
    horizon: int = 64

    def __post_init__(self) -> None:
        if self.block_size < 1 or self.horizon < 1:
            raise BudgetError(
                "a block and the horizon hold at least one draft, "
                f"not {self.block_size} and {self.horizon}"
            )

    def lengths(self, candidates: Sequence[Candidate], cost: CycleCost) -> list[int]:
        if not candidates:
            return []
        seconds = PassSeconds(candidates, cost)
        draft_s = draft_seconds(anchors(candidates), cost)
        base = sum(each.weight for each in candidates)
        if self.anticipating:
            drafts = by_value(candidates, weighted=True)
            return lengths_of(candidates, drafts[: _best(drafts, base, seconds, draft_s)])
        return self._one_by_one(candidates, base, seconds, draft_s)

    def _one_by_one(
        self, candidates: Sequence[Candidate], base: float, seconds: PassSeconds, draft_s: float
    ) -> list[int]:
        lengths = [each.certain for each in candidates]
        frontier = [
            _known(each, lengths[i], i)
            for i, each in enumerate(candidates)
            if lengths[i] < each.most
        ]
        heapq.heapify(frontier)
        plain, gain, taken = base / seconds(0), base, 0
        while frontier:
            rate = max(plain, gain / (draft_s + seconds(taken)))
            if not self._pays(candidates, frontier, rate, seconds, taken):
                break
            draft = heapq.heappop(frontier)
            lengths[draft.request] += 1
            gain -= draft.negative
            taken += 1
            each = candidates[draft.request]
            if lengths[draft.request] < each.most:
                heapq.heappush(frontier, _known(each, draft.position + 1, draft.request))
        return lengths

    def _pays(
        self,
        candidates: Sequence[Candidate],
        frontier: Sequence[_Next],
        rate: float,
        seconds: PassSeconds,
        taken: int,
    ) -> bool:
        """Whether some number of further drafts is expected to earn more than their time is worth
        at ``rate``."""
        ahead = list(frontier)  # a copy of a heap is a heap
        earned = 0.0
        for count in range(1, self.horizon + 1):
            draft = ahead[0]
            if draft.negative >= 0.0:
                return False
            earned -= draft.negative
            if earned > rate * (seconds(taken + count) - seconds(taken)):
                return True
            # The proposal's own length is no bound: it may know that a drafted token was the last.
            each = candidates[draft.request]
            end = self.block_size + each.free
            if draft.position + 1 < (end if each.cap is None else min(end, each.cap)):
                heapq.heapreplace(ahead, draft.forecast())
            else:
                heapq.heappop(ahead)
                if not ahead:
                    return False
        return False


class _Next(NamedTuple):
    """The first draft of a request that is not admitted yet; heaps give the most valuable first.

    ``negative`` is minus its weighted survival, ``conditional`` its survival given the draft
    before it.
    """

    negative: float
    position: int
    request: int
    conditional: float

    def forecast(self) -> _Next:
        """The draft after it, if it survives as this one does."""
        return self._replace(negative=self.negative * self.conditional, position=self.position + 1)


def _known(each: Candidate, position: int, request: int) -> _Next:
    survival = each.survival[position]
    before = each.survival[position - 1] if position else 1.0
    return _Next(-each.weight * survival, position, request, survival / before if before else 0.0)


def _best(drafts: Sequence[Draft], base: float, seconds: PassSeconds, draft_s: float) -> int:
    """How many of ``drafts`` to verify; the fewest among equals."""
    gains = [base]
    best, best_rate = 0, base / (draft_s + seconds(0))
    for taken, draft in enumerate(drafts, start=1):
        gains.append(gains[-1] + draft.value)
        rate = gains[taken] / (draft_s + seconds(taken))
        if rate > best_rate:
            best, best_rate = taken, rate
    plain = base / seconds(0)
    if best_rate >= plain:
        return best
    # The tokens beyond the base that the same seconds of plain decoding would not have given.
    surplus = [
        gain - base - plain * (seconds(taken) - seconds(0)) for taken, gain in enumerate(gains)
    ]
    return surplus.index(max(surplus))
