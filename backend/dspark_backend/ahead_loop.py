"""The loop of a device that runs ahead: a cycle is launched before the one before it was read.

The host is one cycle behind. What it commits, streams and checks (ends, stop strings, limits,
cancellation) is a cycle whose successor is under way already; where that turns out to have been in
vain, it is not looked at: what it wrote lies past the committed length.

Taken for as long as every running step is simple and nobody arrives, ends or is cancelled. All else
is the synchronous cycle's of ``loop.py``, and neither changes what is written: drafts are a
function of the context, and are held against what plain decoding writes there.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from dspark_backend.ahead.protocol import Flight, Flights, Landed, Landing, Plan, Start
from dspark_backend.kv.pool import SequencePool
from dspark_backend.loop import StepLoop
from dspark_backend.request import AcceptanceRule, SamplingParams, StepRequest
from dspark_backend.running import RunningStep
from dspark_backend.sampling.verifier import Verifier
from dspark_backend.scheduler import Limits
from dspark_backend.session import Session
from dspark_backend.speculation.arbiter import Arbiter
from dspark_backend.speculation.cost import CostModel
from dspark_backend.speculation.protocol import Drafter
from dspark_backend.target.protocol import Target

_log = logging.getLogger(__name__)


def simple(request: StepRequest) -> bool:
    """Whether the device can go on with such a step without a word of the host: each token follows
    from the logits and the noise of its position alone, and nobody asks for an account."""
    sampling = request.sampling
    rejects = sampling.temperature > 0.0 and sampling.acceptance == AcceptanceRule.REJECTION
    # All other parameters, those that are yet to be thought of included, rewrite or cut logits.
    bare = SamplingParams(
        temperature=sampling.temperature, seed=sampling.seed, acceptance=sampling.acceptance
    )
    return (
        request.grammar is None
        and not request.explain
        and request.max_new_tokens > 0
        and not rejects
        and sampling == bare
    )


def _may_board(step: RunningStep) -> bool:
    return step.base_rows == 1 and simple(step.request)


@dataclass(frozen=True, slots=True)
class _Leg:
    """A cycle under way."""

    landing: Landing
    plan: Plan
    launched: float


@dataclass(slots=True, eq=False)
class _Trip:
    """A flight of ``steps``, and its cycles that were not read yet, in order."""

    flight: Flight
    steps: list[RunningStep]
    legs: deque[_Leg] = field(default_factory=deque)
    landed: float = 0.0
    """When the last of them was read."""

    def launch(self, plan: Plan) -> None:
        self.legs.append(_Leg(self.flight.launch(plan), plan, time.perf_counter()))

    def read(self) -> tuple[_Leg, list[Landed], float]:
        """The oldest cycle, what it brought, and the seconds that no cycle before it counted.
        Waits for the device."""
        leg = self.legs.popleft()
        landed = leg.landing.read()
        began, self.landed = max(leg.launched, self.landed), time.perf_counter()
        return leg, landed, self.landed - began

    def unread(self, place: int) -> int:
        """The most tokens that those cycles may have written for step ``place``."""
        return sum(1 + leg.plan.lengths[place] for leg in self.legs)


class AheadLoop(StepLoop):
    """A :class:`StepLoop` that runs ahead where it can."""

    def __init__(
        self,
        flights: Flights,
        target: Target,
        verifier: Verifier,
        pool: SequencePool,
        threads: int,
        limits: Limits,
        drafter: Drafter | None,
        arbiter: Arbiter,
        cost: CostModel | None,
        retire: Callable[[Session], None],
    ) -> None:
        """As :class:`StepLoop`, ``flights`` being of its target and drafter."""
        super().__init__(target, verifier, pool, threads, limits, drafter, arbiter, cost, retire)
        self._flights = flights
        self._trip: _Trip | None = None

    def iterate(
        self, lock: AbstractContextManager[Any], live: Callable[[], Sequence[Session]]
    ) -> None:
        """As :meth:`StepLoop.iterate`, or a cycle ahead where that can be."""
        if not self._ahead(lock):
            super().iterate(lock, live)

    def _ahead(self, lock: AbstractContextManager[Any]) -> bool:
        """Launch a cycle and read the one before it; or read alone, where the steps cannot go on
        without what that says. False where nothing is under way, and the synchronous cycle is due.

        Takes the engine's ``lock`` for all but launching and reading."""
        with lock:
            goes_on = self._can_fly()
            if self._trip is not None and not self._trip.legs and not goes_on:
                self._trip = None  # all of it was read
                goes_on = self._can_fly()
            if self._trip is None and goes_on:
                self._trip = self._board()
            trip = self._trip
            plan = self._plan(trip) if trip is not None and goes_on else None
            if trip is None or (plan is None and not trip.legs):
                self._trip = None
                return False
        try:
            if plan is not None:
                trip.launch(plan)
            read = trip.read() if plan is None or len(trip.legs) > 1 else None
        except Exception as error:
            with lock:
                self._crash(trip.steps, error)
            return True
        if read is not None:
            with lock:
                self._land(trip, *read)
        return True

    def _can_fly(self) -> bool:
        """Whether there is nothing else to do than to go on with the steps that run."""
        trip = self._trip
        if trip is not None and trip.steps != self.running:
            return False
        full = len(self.running) >= self._limits.running  # nobody can be admitted before one ends
        return (
            bool(self.running)
            and not self._following
            and (full or not self.waiting)
            and not any(step.cancelled for step in self.unfinished)
            and (trip is not None or all(map(_may_board, self.running)))
        )

    def _board(self) -> _Trip | None:
        """A flight of all that runs; None where one of them died of it, or has lost its drafts."""
        for step in self.running:
            self._guarded(step, partial(self._contexts.catch_up, step))
            self._guarded(step, partial(self._reserve, step))
        self._sweep()
        kvs = [step.session.kv for step in self.running]
        if not kvs or any(kv.draft is not None and kv.draft.length < kv.length for kv in kvs):
            return None
        starts = [
            Start(kv, step.session.log[-1], step.request.sampling)
            for kv, step in zip(kvs, self.running, strict=True)
        ]
        try:
            return _Trip(self._flights.begin(starts), [*self.running])
        except Exception as error:
            self._crash(self.running, error)
            return None

    def _reserve(self, step: RunningStep) -> None:
        """Room for all that the step may still write, and for a block at its end: it was counted
        when the step was admitted."""
        left = step.request.max_new_tokens - step.new_tokens
        kv = step.session.kv
        self._pool.reserve(kv, len(step.session.log) + left + self._flights.block_size)

    def _plan(self, trip: _Trip) -> Plan | None:
        """The next cycle; None where a step may have written all that it is to write by then."""
        left = [
            step.request.max_new_tokens - step.new_tokens - trip.unread(place)
            for place, step in enumerate(trip.steps)
        ]
        if min(left) < 1:
            return None
        if not self._flights.block_size:
            return Plan.plain(len(trip.steps))
        try:
            drafting, lengths = self._arbiter.foreseen(trip.steps)
        except Exception:
            _log.exception("no plan: %d steps decode one token plainly", len(trip.steps))
            return Plan.plain(len(trip.steps))
        # The token after the last draft must fit as well.
        return Plan(
            tuple(place for place in drafting if left[place] > 1),
            tuple(min(length, more - 1) for length, more in zip(lengths, left, strict=True)),
        )

    def _land(self, trip: _Trip, leg: _Leg, landed: Sequence[Landed], seconds: float) -> None:
        for place, (step, one) in enumerate(zip(trip.steps, landed, strict=True)):
            if not step.finished:
                length = leg.plan.lengths[place]
                self._guarded(step, partial(self._settle, step, one, length, seconds))
        self._sweep()
        if all(step.finished for step in trip.steps):
            self._trip = None  # whatever is still under way is nobody's

    def _settle(self, step: RunningStep, landed: Landed, length: int, seconds: float) -> None:
        """Commit what holds of the first ``length`` drafts of a cycle."""
        kv = step.session.kv
        try:
            if landed.proposal.tokens:
                step.offer(self._arbiter.drafted(step, landed.proposal), None)
                step.block = step.block.first(length)
            block = step.block
            step.computed(step.pending, seconds)
            accepted = step.advance(landed.answer)
            self._arbiter.learn(step, None, block, accepted)
        finally:
            # The device wrote the draft context along.
            if kv.draft is not None:
                kv.draft.length = kv.length

    def _crash(self, steps: Sequence[RunningStep], error: Exception) -> None:
        """A cycle died: ``steps``, which took part in it, end with ``error``."""
        self._trip = None
        for step in steps:
            if not step.finished:
                self._guarded(step, partial(step.fail, error))
        self._sweep()
