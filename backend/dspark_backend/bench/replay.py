"""Recorded steps decoded again by many agents at once, under a budget policy and a cost curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dspark_backend.bench.cycle_records import Offer, StepRecord, offer_at
from dspark_backend.bench.errors import BenchError
from dspark_backend.request import StepKind
from dspark_backend.speculation.candidate import BudgetPolicy, Candidate, CycleCost
from dspark_backend.speculation.parking import worth_drafting


@dataclass(frozen=True, slots=True)
class Contender:
    """A policy and when it calls the drafter: never, always, or (``parks``) where
    ``worth_drafting`` expects it to pay."""

    policy: BudgetPolicy
    drafts: bool = True
    parks: bool = False


@dataclass(frozen=True, slots=True)
class Tally:
    """Sums over a replay. ``request_cycles`` counts an agent in a cycle, ``drafted`` those whose
    drafter was called, ``verified`` drafts that got a row, ``held`` those of them that were
    accepted; ``seconds`` is simulated time."""

    cycles: int
    seconds: float
    tokens: int
    request_cycles: int
    drafted: int
    verified: int
    held: int


class _Agent:
    """Runs the recorded steps one after another, for ever, from a step of its own on."""

    def __init__(self, steps: Sequence[StepRecord], first: int) -> None:
        self._steps = steps
        self._index = first % len(steps)
        self._position = 0

    @property
    def step(self) -> StepRecord:
        return self._steps[self._index]

    @property
    def context(self) -> int:
        return self.step.context + self._position

    @property
    def room(self) -> int:
        """Proposed tokens that can be verified: the pass itself gives one more."""
        return self.step.tokens - self._position - 1

    def offer(self) -> Offer:
        return offer_at(self.step, self._position)

    def advance(self, tokens: int) -> None:
        self._position += tokens
        if self._position >= self.step.tokens:
            self._index = (self._index + 1) % len(self._steps)
            self._position = 0


def replay(
    steps: Sequence[StepRecord],
    contender: Contender,
    cost: CycleCost,
    agents: int,
    tokens_per_agent: int,
) -> Tally:
    """Decode with ``agents`` running all the time, until they wrote ``tokens_per_agent`` each on
    average, and as much as was recorded. All agents take part in every pass; prefills and the time
    of tools are left out.

    Raises BenchError without steps, agents or tokens.
    """
    if not steps or agents < 1 or tokens_per_agent < 1:
        raise BenchError(
            f"nothing to replay: {len(steps)} steps, {agents} agents of {tokens_per_agent} tokens"
        )
    expected = mean_survivals(steps)
    running = [_Agent(steps, first) for first in range(agents)]
    cycles = tokens = drafted = verified = held = 0
    seconds = 0.0
    enough = max(agents * tokens_per_agent, sum(step.tokens for step in steps))
    while tokens < enough:
        offers = [agent.offer() for agent in running]
        drafting = _drafting(running, offers, contender, expected, cost)
        candidates = [
            _candidate(agent, offer, drafted=calls)
            for agent, offer, calls in zip(running, offers, drafting, strict=True)
        ]
        lengths = contender.policy.lengths(candidates, cost)
        rows = sum(each.base_rows for each in candidates) + sum(lengths)
        seconds += cost.verify_s(rows, agents, sum(each.context for each in candidates))
        called = sum(each.drafted for each in candidates)
        seconds += cost.draft_s(called)
        for agent, offer, each, length in zip(running, offers, candidates, lengths, strict=True):
            accepted = min(length, offer.accepted)
            agent.advance(accepted + 1)
            tokens += accepted + 1
            verified += length - each.certain
            held += accepted - each.certain
        drafted += called
        cycles += 1
    return Tally(cycles, seconds, tokens, cycles * agents, drafted, verified, held)


def mean_survivals(steps: Sequence[StepRecord]) -> Mapping[StepKind, tuple[float, ...]]:
    """By step kind, the mean survival of every draft beyond the free ones: what can be expected
    before the drafter is asked. A proposal that ends early counts as 0 from there on."""
    sums: dict[StepKind, list[float]] = {}
    counts: dict[StepKind, int] = {}
    for step in steps:
        mine = sums.setdefault(step.kind, [])
        for cycle in step.cycles:
            drafts = cycle.survival[cycle.free :]
            mine.extend([0.0] * (len(drafts) - len(mine)))
            for k, value in enumerate(drafts):
                mine[k] += value
        counts[step.kind] = counts.get(step.kind, 0) + len(step.cycles)
    return {
        kind: tuple(min(1.0, value / counts[kind]) for value in mine) for kind, mine in sums.items()
    }


def _drafting(
    running: Sequence[_Agent],
    offers: Sequence[Offer],
    contender: Contender,
    expected: Mapping[StepKind, tuple[float, ...]],
    cost: CycleCost,
) -> list[bool]:
    """Whose proposals are drafted; nobody's where nothing beyond the free tokens could be."""
    possible = [
        contender.drafts and agent.room > offer.free and len(offer.survival) > offer.free
        for agent, offer in zip(running, offers, strict=True)
    ]
    if not contender.parks:
        return possible
    hopes = [
        Candidate(
            (1.0,) * offer.free + (expected[agent.step.kind] if can else ()),
            context=agent.context,
            cap=agent.room,
            free=offer.free,
        )
        for agent, offer, can in zip(running, offers, possible, strict=True)
    ]
    return worth_drafting(hopes, cost)


def _candidate(agent: _Agent, offer: Offer, *, drafted: bool) -> Candidate:
    """Without the drafter, what the grammar forces is still proposed."""
    return Candidate(
        offer.survival if drafted else offer.survival[: offer.free],
        context=agent.context,
        cap=agent.room,
        free=offer.free,
        drafted=drafted,
    )
