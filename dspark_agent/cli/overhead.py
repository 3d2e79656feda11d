"""What the SDK itself adds to a step: the wall clock of steps whose model answers at once."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import anyio
from pydantic import BaseModel, ConfigDict
from rich import box
from rich.table import Table

from dspark_agent.agent import Agent
from dspark_agent.limits import UsageLimits
from dspark_agent.messages import ModelRequest, ModelResponse, TextPart, ToolCallPart
from dspark_agent.models.base import (
    CallChunk,
    CallEnd,
    CallStart,
    Emit,
    Model,
    ModelSession,
    ModelTurn,
    TextChunk,
)
from dspark_agent.session import Session
from dspark_backend.bench.host import HostFacts, host_facts
from dspark_backend.bench.stats import median, percentile

_UNLIMITED = UsageLimits(request_limit=None)
Counted = Callable[[int, int], None]


class OverheadSettings(BaseModel):
    """``steps`` of each kind in one conversation, ``rounds`` conversations of each kind."""

    model_config = ConfigDict(frozen=True)

    steps: int = 200
    rounds: int = 5


class KindOverhead(BaseModel):
    """Steps of one kind, all rounds together. ``*_s`` are seconds of wall clock a step.

    ``first_s`` and ``last_s`` are the medians of each conversation's first and last tenth;
    ``growth`` is their ratio: 1 where a long history costs nothing.
    """

    model_config = ConfigDict(frozen=True)

    count: int
    median_s: float
    p95_s: float
    first_s: float
    last_s: float
    growth: float


class OverheadReport(BaseModel):
    """``kinds`` by name: ``text``, ``typed`` (its type given with the step), ``tool`` (async),
    ``thread_tool`` (sync, in a worker thread) and ``events`` (text, with a listener)."""

    model_config = ConfigDict(frozen=True)

    schema_version: int = 1
    host: HostFacts
    settings: OverheadSettings
    kinds: dict[str, KindOverhead]


class Reading(BaseModel):
    """What the typed steps ask for."""

    place: str
    celsius: float


class InstantModel(Model):
    """Writes what the turn asks for, of constant size, in no time to speak of."""

    @property
    def name(self) -> str:
        return "instant"

    async def open(
        self, widest: ModelTurn, *, token_log: Sequence[int] | None = None
    ) -> ModelSession:
        return _InstantSession()


@dataclass(slots=True)
class _InstantSession(ModelSession):
    turns: int = 0

    async def step(
        self, messages: Sequence[ModelRequest | ModelResponse], turn: ModelTurn, emit: Emit
    ) -> ModelResponse:
        self.turns += 1
        if turn.tools:
            call = ToolCallPart(tool_name=turn.tools[0].name, args={"n": self.turns})
            await emit(CallStart(0, call.tool_name))
            await emit(CallChunk(0, call.args_json()))
            await emit(CallEnd(0, call))
            return ModelResponse(parts=(call,))
        text = "Nothing new." if turn.output_schema is None else '{"place": "Oslo", "celsius": -3}'
        for word in text.split(" "):
            await emit(TextChunk(word))
        return ModelResponse(parts=(TextPart(content=text),))

    def mark(self) -> object:
        return self.turns

    async def rollback(self, mark: object) -> None:
        assert isinstance(mark, int)
        self.turns = mark

    async def fork(self) -> ModelSession:
        return _InstantSession(self.turns)


async def count(n: int) -> int:
    """Count on."""
    return n + 1


def count_in_thread(n: int) -> int:
    """Count on."""
    return n + 1


Take = Callable[[Session[object, str]], Awaitable[object]]
_KINDS: dict[str, Take] = {
    "text": lambda session: session.step("Go on.", tools=[]),
    "typed": lambda session: session.step("Read it.", output_type=Reading),
    "tool": lambda session: session.step("Count.", tool_choice="count"),
    "thread_tool": lambda session: session.step("Count.", tool_choice="count_in_thread"),
    "events": lambda session: session.step("Go on.", tools=[]),
}


def run_overhead(
    settings: OverheadSettings, *, on_step: Counted = lambda done, total: None
) -> OverheadReport:
    """Measure all kinds of steps, in turns, so that what else the machine does hits all alike."""
    return anyio.run(_run, settings, on_step)


async def _run(settings: OverheadSettings, on_step: Counted) -> OverheadReport:
    seconds: dict[str, list[list[float]]] = {name: [] for name in _KINDS}
    total = settings.rounds * len(_KINDS)
    for _ in range(settings.rounds):
        for name, take in _KINDS.items():
            seconds[name].append(await _conversation(name, take, settings.steps))
            on_step(sum(len(rounds) for rounds in seconds.values()), total)
    return OverheadReport(
        host=host_facts(),
        settings=settings,
        kinds={name: _summed(rounds) for name, rounds in seconds.items()},
    )


async def _conversation(name: str, take: Take, steps: int) -> list[float]:
    agent = Agent(InstantModel(), tools=[count, count_in_thread], limits=_UNLIMITED)
    listener = (lambda event: None) if name == "events" else None
    seconds = []
    async with agent.session(on_event=listener) as session:
        for _ in range(steps):
            began = time.perf_counter()
            await take(session)
            seconds.append(time.perf_counter() - began)
    return seconds


def _summed(rounds: Sequence[Sequence[float]]) -> KindOverhead:
    tenth = max(1, len(rounds[0]) // 10)
    every = [second for steps in rounds for second in steps]
    first = _median([second for steps in rounds for second in steps[:tenth]])
    last = _median([second for steps in rounds for second in steps[-tenth:]])
    return KindOverhead(
        count=len(every),
        median_s=_median(every),
        p95_s=percentile(every, 0.95) or 0.0,
        first_s=first,
        last_s=last,
        growth=last / first,
    )


def _median(values: Sequence[float]) -> float:
    middle = median(values)
    assert middle is not None
    return middle


def overhead_table(report: OverheadReport) -> Table:
    """One row a kind; milliseconds a step."""
    title = f"SDK overhead, {report.settings.rounds} conversations of {report.settings.steps} steps"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("step", no_wrap=True)
    for heading in ("median ms", "p95 ms", "first tenth ms", "last tenth ms", "growth"):
        table.add_column(heading, justify="right")
    for name, kind in report.kinds.items():
        figures = (kind.median_s, kind.p95_s, kind.first_s, kind.last_s)
        table.add_row(name, *(f"{s * 1000:.3f}" for s in figures), f"{kind.growth:.2f}x")
    return table
