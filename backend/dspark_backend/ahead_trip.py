"""A flight as the loop keeps it: whose it is, and what of it was not read yet."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from dspark_backend.ahead.protocol import (
    Brought,
    Flight,
    GuidedFlight,
    GuidedLanding,
    Landed,
    Landing,
    Masked,
    Plan,
)
from dspark_backend.running import RunningStep


@dataclass(frozen=True, slots=True)
class _Unread:
    """A cycle under way."""

    landing: Landing
    plan: Plan
    launched: float


@dataclass(slots=True, eq=False)
class Trip:
    """A flight of ``steps``, and its cycles that were not read yet, in order."""

    flight: Flight
    steps: list[RunningStep]
    _legs: deque[_Unread] = field(default_factory=deque)
    _read: float = 0.0
    """When the last of them was."""

    @property
    def under_way(self) -> int:
        """Cycles that were not read yet."""
        return len(self._legs)

    def launch(self, plan: Plan) -> None:
        """Waits for nothing."""
        self._legs.append(_Unread(self.flight.launch(plan), plan, time.perf_counter()))

    def read(self) -> tuple[Plan, list[Landed], float]:
        """Of the oldest cycle its plan, what it brought, and the seconds that no cycle before it
        counted. Waits for the device."""
        leg = self._legs.popleft()
        landed = leg.landing.read()
        began, self._read = max(leg.launched, self._read), time.perf_counter()
        return leg.plan, landed, self._read - began

    def unread(self, place: int) -> int:
        """The most tokens that those cycles may have written for step ``place``."""
        return sum(1 + leg.plan.lengths[place] for leg in self._legs)


@dataclass(slots=True, eq=False)
class GuidedTrip:
    """A guided flight of ``steps``, and its pass under way."""

    flight: GuidedFlight
    steps: list[RunningStep]
    plan: Plan | None = None
    """Of the pass under way."""
    _landing: GuidedLanding | None = None
    _spent: float = 0.0
    """Seconds of launching and waiting since the last verdict. What the host does in between has
    names of its own."""

    def launch(self, plan: Plan | None, masks: Sequence[Masked]) -> None:
        """Have the pass under way judged, and launch the next one; waits for nothing."""
        started = time.perf_counter()
        self._landing = self.flight.launch(plan, masks)
        self.plan = plan
        self._spent += time.perf_counter() - started

    def read(self) -> tuple[Brought, float]:
        """What was judged and drafted last, and the seconds that were spent on it. Waits for the
        device, but not for the pass under way."""
        assert self._landing is not None
        started = time.perf_counter()
        brought = self._landing.read()
        self._spent += time.perf_counter() - started
        seconds = self._spent
        if brought.answers:
            self._spent = 0.0
        return brought, seconds

    def unread(self, place: int) -> int:
        """The most tokens that the pass under way may write for step ``place``."""
        return 0 if self.plan is None else 1 + self.plan.lengths[place]
