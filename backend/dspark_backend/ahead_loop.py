"""The loop of a device that runs ahead: a cycle is launched before the one before it was read.

The host is one cycle behind, or where a grammar has a say, one pass. What it commits, streams and
checks (ends, stop strings, limits, cancellation) is a cycle whose successor is under way already;
where that turns out to have been in vain, it is not looked at: what it wrote lies past the
committed length.

Taken for as long as every running step is simple, nothing of what comes next is known, and nobody
arrives, ends or is cancelled. All else is the synchronous cycle's of ``loop.py``, and neither
changes what is written: drafts are a function of the context, and are held against what plain
decoding writes there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from dspark_backend.ahead.protocol import Brought, Flights, Landed, Plan, Start
from dspark_backend.ahead_trip import GuidedTrip, Trip
from dspark_backend.kv.pool import SequencePool
from dspark_backend.loop import StepLoop
from dspark_backend.request import AcceptanceRule, SamplingParams, StepRequest
from dspark_backend.running import RunningStep
from dspark_backend.sampling.verifier import Answer, Verifier
from dspark_backend.scheduler import Limits
from dspark_backend.session import Session
from dspark_backend.speculation.arbiter import Arbiter
from dspark_backend.speculation.cost import CostModel
from dspark_backend.speculation.protocol import Drafter, Proposal
from dspark_backend.target.protocol import Target

_log = logging.getLogger(__name__)

# Drafts of a flight know no grammar, and where it forces a span, a pass is under way that does not
# hold it. So names, numbers and short values are the synchronous cycle's.
_FREELY = 8  # tokens that a step wrote on end without having been forced
# A copy that is expected to hold for more tokens than this, and than a block of drafts, is laid out
# by the synchronous cycle.
_COPIED = 4


def simple(request: StepRequest) -> bool:
    """Whether the device can go on with such a step without a word of the host, but for the masks
    of a grammar: each token follows from the logits and the noise of its position alone, and nobody
    asks for an account."""
    sampling = request.sampling
    rejects = sampling.temperature > 0.0 and sampling.acceptance == AcceptanceRule.REJECTION
    # All other parameters, those that are yet to be thought of included, rewrite or cut logits.
    bare = SamplingParams(
        temperature=sampling.temperature, seed=sampling.seed, acceptance=sampling.acceptance
    )
    return not request.explain and request.max_new_tokens > 0 and not rejects and sampling == bare


def _may_board(step: RunningStep) -> bool:
    freely = step.request.grammar is None or step.freely >= _FREELY
    return step.base_rows == 1 and simple(step.request) and freely


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
        self._trip: Trip | GuidedTrip | None = None

    def iterate(
        self, lock: AbstractContextManager[Any], live: Callable[[], Sequence[Session]]
    ) -> None:
        """As :meth:`StepLoop.iterate`, or a cycle ahead where that can be."""
        trip = self._trip
        if isinstance(trip, GuidedTrip):
            self._go_on_guided(lock, trip)
        elif not self._go_on(lock, trip):
            super().iterate(lock, live)

    def _go_on(self, lock: AbstractContextManager[Any], trip: Trip | None) -> bool:
        """Launch a cycle and read the one before it; or read alone, where the steps cannot go on
        without what that says. False where nothing is under way, and the synchronous cycle is due.

        Takes the engine's ``lock`` for all but launching and reading."""
        with lock:
            goes_on = self._can_fly()
            if trip is not None and not trip.under_way and not goes_on:
                self._trip = None  # all of it was read
                goes_on = self._can_fly()
            if self._trip is None and goes_on:
                self._trip = self._board()
            current = self._trip
            plan = self._plan(current) if current is not None and goes_on else None
            if plan is None and not (isinstance(current, Trip) and current.under_way):
                self._trip = None
                return False
        assert current is not None
        try:
            if isinstance(current, GuidedTrip):
                current.launch(plan, ())
                return True
            if plan is not None:
                current.launch(plan)
            read = current.read() if plan is None or current.under_way > 1 else None
        except Exception as error:
            with lock:
                self._crash(current.steps, error)
            return True
        if read is not None:
            with lock:
                self._land(current, *read)
        return True

    def _go_on_guided(self, lock: AbstractContextManager[Any], trip: GuidedTrip) -> None:
        """Read what is known before the pass under way is through, and launch what follows it; or
        end the flight, with that pass.

        Takes the engine's ``lock`` for all but launching and reading."""
        try:
            brought, seconds = trip.read()
            with lock:
                plan = self._follow(trip, brought, seconds)
                if self._trip is None:
                    return
                masks = [step.block.masks for step in trip.steps]
            trip.launch(plan, masks)
            if plan is None:
                brought, seconds = trip.read()
        except Exception as error:
            with lock:
                self._crash(trip.steps, error)
            return
        if plan is None:
            with lock:
                self._trip = None
                self._judged(trip, brought, seconds)
                for step in trip.steps:
                    self._guarded(step, step.splice)
                self._sweep()

    def _follow(self, trip: GuidedTrip, brought: Brought, seconds: float) -> Plan | None:
        """Commit what was judged, lay out what is under way, and say what follows it; None where
        the flight ends with that."""
        assert trip.plan is not None
        self._judged(trip, brought, seconds)
        if all(step.finished for step in trip.steps):
            self._trip = None  # whatever is still under way is nobody's
            return None
        blocks = zip(trip.steps, brought.proposals, trip.plan.lengths, strict=True)
        for step, proposal, length in blocks:
            if not step.finished:
                self._guarded(step, partial(self._lay_down, step, proposal, length))
        self._sweep()
        for step in self.running:
            if self._determined(step):
                step.freely = 0  # the pass under way may write the span: nobody will see it as one
        return self._plan(trip) if self._can_fly() else None

    def _judged(self, trip: GuidedTrip, brought: Brought, seconds: float) -> None:
        for step, answer in zip(trip.steps, brought.answers, strict=False):
            if not step.finished:
                self._guarded(step, partial(self._settle, step, answer, seconds))
        self._sweep()

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
            and not any(map(self._better_off, self.running))
        )

    def _better_off(self, step: RunningStep) -> bool:
        """Whether the synchronous cycle knows what comes next: by the grammar, or by a copy."""
        if self._determined(step):
            return True
        offer = self._copy(step)
        return offer is not None and offer.gain > max(_COPIED, self._flights.block_size)

    def _determined(self, step: RunningStep) -> bool:
        try:
            return step.determined
        except Exception:
            return True  # the step dies of it in the synchronous cycle

    def _board(self) -> Trip | GuidedTrip | None:
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
            if any(step.request.grammar is not None for step in self.running):
                return GuidedTrip(self._flights.begin_guided(starts), [*self.running])
            return Trip(self._flights.begin(starts), [*self.running])
        except Exception as error:
            self._crash(self.running, error)
            return None

    def _reserve(self, step: RunningStep) -> None:
        """Room for all that the step may still write, and for a block at its end: it was counted
        when the step was admitted."""
        left = step.request.max_new_tokens - step.new_tokens
        kv = step.session.kv
        self._pool.reserve(kv, len(step.session.log) + left + self._flights.block_size)

    def _plan(self, trip: Trip | GuidedTrip) -> Plan | None:
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

    def _land(self, trip: Trip, plan: Plan, landed: Sequence[Landed], seconds: float) -> None:
        for step, one, length in zip(trip.steps, landed, plan.lengths, strict=True):
            if not step.finished:
                self._guarded(step, partial(self._take, step, one, length, seconds))
        self._sweep()
        if all(step.finished for step in trip.steps):
            self._trip = None  # whatever is still under way is nobody's

    def _take(self, step: RunningStep, landed: Landed, length: int, seconds: float) -> None:
        self._lay_down(step, landed.proposal, length)
        self._settle(step, landed.answer, seconds)

    def _lay_down(self, step: RunningStep, proposal: Proposal, length: int) -> None:
        """The first ``length`` drafts are, or were, computed."""
        offer = self._arbiter.drafted(step, proposal) if proposal.tokens else None
        step.offer_under_way(offer, length)

    def _settle(self, step: RunningStep, answer: Answer, seconds: float) -> None:
        """Commit what holds of the drafts that were laid down."""
        kv, block = step.session.kv, step.block
        try:
            step.computed(step.pending, seconds)
            accepted = step.advance(answer, splice=False)
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
