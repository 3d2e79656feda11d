"""What tests of running ahead have in common: steps at once, and flights that are watched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from dspark_backend.ahead.protocol import (
    Flight,
    Flights,
    GuidedFlight,
    Masked,
    Plan,
    Start,
)
from dspark_backend.catalog import ModelFiles
from dspark_backend.engine import Engine
from dspark_backend.parts import device_parts
from dspark_backend.request import StepOutcome, StepRequest
from dspark_backend.scheduler import Limits

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def outcomes(engine: Engine, steps: Sequence[StepRequest]) -> list[StepOutcome]:
    """Of all steps at once, in sessions of their own."""
    with engine.lock:  # so that all of them are there when the first one begins
        sessions = [engine.open_session() for _ in steps]
        handles = [engine.submit(s, step) for s, step in zip(sessions, steps, strict=True)]
    made = [handle.result(300) for handle in handles]
    for session, step, outcome in zip(sessions, steps, made, strict=True):
        assert session.tokens == (*step.tokens, *outcome.token_ids)
        session.close()
    return made


@dataclass
class Watched:
    """Flights, and what was asked of them: ``begin``, ``launch 0``, ``launch 1``, ``read 0``; of
    guided ones ``guided begin`` and so on, and ``guided end`` for the last verdict."""

    flights: Flights
    asked: list[str] = field(default_factory=list)
    at_launch: Callable[[int], None] = lambda number: None

    @property
    def block_size(self) -> int:
        return self.flights.block_size

    @property
    def cycles(self) -> int:
        return self.flights.cycles

    @property
    def most_unread(self) -> int:
        """Cycles under way at once."""
        counts, unread = [0], 0
        for what in self.asked:
            unread = 0 if what == "begin" else unread + (1 if "launch" in what else -1)
            counts.append(unread)
        return max(counts)

    def begin(self, starts: Sequence[Start]) -> Flight:
        self.asked.append("begin")
        return WatchedFlight(self, self.flights.begin(starts))

    def begin_guided(self, starts: Sequence[Start]) -> GuidedFlight:
        self.asked.append("guided begin")
        return WatchedGuidedFlight(self, self.flights.begin_guided(starts), "guided ")


class Readable(Protocol):
    def read(self) -> Any: ...


@dataclass
class WatchedFlight:
    watched: Watched
    flight: Any
    kind: str = ""
    launched: int = 0

    def launch(self, plan: Plan) -> Any:
        return self.landing(f"launch {self.launched}", lambda: self.flight.launch(plan))

    def landing(self, what: str, launch: Callable[[], Readable]) -> WatchedLanding:
        number, self.launched = self.launched, self.launched + 1
        self.watched.asked.append(self.kind + what)
        self.watched.at_launch(number)
        return WatchedLanding(self, launch(), number)


@dataclass
class WatchedGuidedFlight(WatchedFlight):
    def launch(self, plan: Plan | None, masks: Sequence[Masked] = ()) -> Any:
        what = "end" if plan is None else f"launch {self.launched}"
        return self.landing(what, lambda: self.flight.launch(plan, masks))


@dataclass
class WatchedLanding:
    flight: WatchedFlight
    landing: Readable
    number: int

    def read(self) -> Any:
        self.flight.watched.asked.append(f"{self.flight.kind}read {self.number}")
        return self.landing.read()


def ahead_engine(
    files: ModelFiles, limits: Limits | None = None, **options: Any
) -> tuple[Engine, Watched]:
    """Without a drafter."""
    parts = device_parts(files, "fp32", 256, None, DEVICE, ahead=True)
    assert parts.flights is not None
    watched = Watched(parts.flights)
    parts = replace(parts, flights=watched)
    return Engine(files, parts, 1, 2**21, limits or Limits(), **options), watched
