"""The paper's two prefix schedulers (DSpark, Algorithm 1 and its production variant).

Both maximise expected tokens a second of the target pass alone: requests count alike, the draft
costs nothing. They are what :class:`~dspark_backend.speculation.step_aware.StepAware` is compared
with.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Final

from dspark_backend.speculation.admission import PassSeconds, by_value, lengths_of
from dspark_backend.speculation.candidate import Candidate, CycleCost

STALENESS: Final = 2
"""Iterations between the survivals that set the capacity and the pass that it bounds."""


@dataclass(frozen=True, slots=True)
class PrefixThroughput:
    """Algorithm 1: admit by survival while the expected throughput tau * SPS(B) rises, and stop
    where it does not.

    Non-anticipating, since a draft's admission is settled by survivals no smaller than its own.
    Finds the best throughput where the cost is convex in rows; a jagged curve stops it at a step.
    """

    parks: ClassVar[bool] = False

    def lengths(self, candidates: Sequence[Candidate], cost: CycleCost) -> list[int]:
        if not candidates:
            return []
        drafts = by_value(candidates, weighted=False)
        seconds = PassSeconds(candidates, cost)
        tokens, taken = float(len(candidates)), 0
        for draft in drafts:
            if (tokens + draft.value) / seconds(taken + 1) <= tokens / seconds(taken):
                break
            tokens += draft.value
            taken += 1
        return lengths_of(candidates, drafts[:taken])


@dataclass(slots=True)
class StaleCapacity:
    """The production variant: how many drafts a pass takes is the global optimum over the cost
    curve for the survivals of two iterations ago; which ones, the live survivals say, in order.

    ``history`` is its whole state: the candidates of the last two iterations. Where the number of
    requests has changed since, the capacity is taken a request. Until there are two iterations it
    decides as Algorithm 1 does.
    """

    parks: ClassVar[bool] = False

    history: deque[tuple[Candidate, ...]] = field(default_factory=lambda: deque(maxlen=STALENESS))

    def lengths(self, candidates: Sequence[Candidate], cost: CycleCost) -> list[int]:
        if not candidates:
            return []
        if len(self.history) < STALENESS:
            lengths = PrefixThroughput().lengths(candidates, cost)
        else:
            then = self.history[0]
            drafts = optimal_drafts(then, cost) * len(candidates) // len(then)
            live = [each for each in by_value(candidates, weighted=False) if each.value > 0.0]
            lengths = lengths_of(candidates, live[:drafts])
        self.history.append(tuple(candidates))
        return lengths


def optimal_drafts(candidates: Sequence[Candidate], cost: CycleCost) -> int:
    """The number of drafts of the greatest expected throughput, over the whole curve; the fewest
    among equals."""
    seconds = PassSeconds(candidates, cost)
    tokens = float(len(candidates))
    best, best_rate = 0, tokens / seconds(0)
    for taken, draft in enumerate(by_value(candidates, weighted=False), start=1):
        tokens += draft.value
        rate = tokens / seconds(taken)
        if rate > best_rate:
            best, best_rate = taken, rate
    return best
