"""Memory for a step that is about to leave the queue, and for whom it is taken from."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from dspark_backend.kv.pool import SequencePool
from dspark_backend.kv.retention import returns_in
from dspark_backend.kv.sequence import KV
from dspark_backend.running import RunningStep
from dspark_backend.session import Session


class Admission:
    """Reserves a step's keys and values for as long as it can get, so that none dies of memory on
    its way. For the holder of the engine's lock.

    Memory comes, in this order, from kept prefixes of closed sessions, from what idle sessions
    reserved and did not use, and from the idle sessions themselves: who returns last gives up
    first, who waits in the queue last. Sessions whose steps run give up nothing.
    """

    def __init__(self, pool: SequencePool, margin: int) -> None:
        """``margin``: positions a drafter uses past the end of a sequence."""
        self._pool = pool
        self._margin = margin
        self._source: tuple[KV | None, int] = (None, 0)

    def check_fits(self, positions: int) -> None:
        """Raises CapacityError when a step that ends with so many positions can never run."""
        self._pool.check_fits(positions + self._margin)

    def make_room(self, step: RunningStep, live: Sequence[Session]) -> bool:
        """Whether ``step`` can be admitted now; with nothing else running it always can.

        After True, :meth:`fill` is the next call. ``live`` are all sessions of the engine.
        """
        self._source = source, shared = self._longest(step, live)
        idle = _idle(_others(step, live))
        return self._pool.make_room(step.session.kv, self._needed(step), idle, source, shared)

    def known(self, step: RunningStep, live: Sequence[Session]) -> int:
        """How many tokens of its log ``step`` could take over now."""
        session = step.session
        return 0 if session.kv.length else self._pool.known(session.log, _logs(step, live))

    def fill(self, step: RunningStep) -> None:
        """Reserve the room, and take over what another sequence has of the log already."""
        kv = step.session.kv
        source, shared = self._source
        self._source = (None, 0)
        # Making room may have cost the source itself; then there is nothing to take over.
        if source is not None and source.length >= shared:
            self._pool.take_over(kv, source, shared, self._needed(step))
        else:
            self._pool.reserve(kv, self._needed(step))

    def _longest(self, step: RunningStep, live: Sequence[Session]) -> tuple[KV | None, int]:
        session = step.session
        if session.kv.length:
            return None, 0
        return self._pool.longest(session.log, _logs(step, live))

    def _needed(self, step: RunningStep) -> int:
        return len(step.session.log) + step.request.max_new_tokens + self._margin


def _others(step: RunningStep, live: Sequence[Session]) -> list[Session]:
    """Sessions that hold memory, but for the step's own."""
    return [other for other in live if other is not step.session and other.kv.capacity]


def _logs(step: RunningStep, live: Sequence[Session]) -> Iterator[tuple[Sequence[int], KV]]:
    """What they hold."""
    return ((other.log, other.kv) for other in _others(step, live))


def _idle(sessions: Sequence[Session]) -> list[KV]:
    """The sequences of those whose step does not run: who returns last first, who waits in the
    queue last."""
    now = time.monotonic()
    away = [
        (
            session.running is not None,
            -returns_in(now, session.idle_since, session.expected_at),
            place,
        )
        for place, session in enumerate(sessions)
        if session.running is None or not session.running.admitted
    ]
    return [sessions[place].kv for _, _, place in sorted(away)]
