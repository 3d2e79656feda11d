"""What happened in a step, and when: each step keeps a trace, which timelines and observers read.

Moments are on the clock of :func:`time.perf_counter`: comparable within one process only.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from dspark_agent.deferred import AwaitsApproval
from dspark_agent.errors import UserError
from dspark_agent.limits import RunUsage
from dspark_agent.messages import ModelResponse, RetryPromptPart, ToolCallPart, ToolReturnPart
from dspark_agent.metrics import StepMetrics

if TYPE_CHECKING:
    from types import TracebackType

    from dspark_agent.step import StepKind
    from dspark_agent.timeline import Timeline


@dataclass(frozen=True, slots=True)
class TokenRun:
    """Tokens in a row that came from one source: ``"model"``, ``"forced"`` (by the grammar) or a
    proposer's name. ``ended`` is when the last of them was committed."""

    source: str
    tokens: int
    text: str
    ended: float


@dataclass(slots=True)
class ToolTrace:
    """One call of a tool. ``ended`` and ``outcome`` are None while it runs, and ``outcome`` stays
    None where it raised or was cancelled."""

    call: ToolCallPart
    began: float = field(default_factory=time.perf_counter)
    ended: float | None = None
    outcome: ToolReturnPart | RetryPromptPart | AwaitsApproval | None = None

    @property
    def part(self) -> ToolReturnPart | RetryPromptPart | None:
        """What the model reads of it; None where there is nothing (yet)."""
        return None if isinstance(self.outcome, AwaitsApproval) else self.outcome


def unwatched(call: ToolCallPart) -> AbstractContextManager[ToolTrace]:
    """Around a call that nobody wants to know of."""
    return nullcontext(ToolTrace(call))


@dataclass(slots=True)
class RunTrace:
    """A whole run; ``usage`` is there once it has ended with a result."""

    agent: str
    model: str
    provider: str
    conversation_id: str
    began: float = field(default_factory=time.perf_counter)
    usage: RunUsage | None = None


@dataclass(slots=True)
class StepTrace:
    """One model turn and its tools, filled in while they go on; or tools alone, whose calls had
    waited for approval.

    ``response`` and ``model_ended`` are set once the model has answered, ``metrics`` and
    ``retry_reason`` when the step is done; ``error`` names the exception that ended it instead, or
    is ``"cancelled"``.
    ``nested`` are the steps that other agents took inside this one's tools. ``is_replayed``: the
    model's answer was in the run's journal.
    """

    agent: str
    model: str
    provider: str
    conversation_id: str
    index: int
    kind: StepKind
    attempt: int
    began: float = field(default_factory=time.perf_counter)
    model_ended: float | None = None
    ended: float | None = None
    response: ModelResponse | None = None
    metrics: StepMetrics | None = None
    retry_reason: str | None = None
    error: str | None = None
    is_replayed: bool = False
    token_runs: list[TokenRun] = field(default_factory=list)
    tools: list[ToolTrace] = field(default_factory=list)
    nested: list[StepTrace] = field(default_factory=list)

    def wrote(self, source: str, tokens: int, text: str) -> None:
        """Tokens were committed now; a run of the same source grows."""
        now = time.perf_counter()
        if self.token_runs and self.token_runs[-1].source == source:
            last = self.token_runs.pop()
            tokens, text = last.tokens + tokens, last.text + text
        self.token_runs.append(TokenRun(source, tokens, text, now))


_enclosing: ContextVar[list[StepTrace] | None] = ContextVar("dspark_agent_steps", default=None)


@contextmanager
def collected(trace: StepTrace) -> Iterator[None]:
    """Add ``trace`` to what encloses it, a recording or another agent's step; steps taken inside
    become its own."""
    outer = _enclosing.get()
    if outer is not None:
        outer.append(trace)
    token = _enclosing.set(trace.nested)
    try:
        yield
    finally:
        _enclosing.reset(token)


class Recording:
    """Keeps the steps that agents take inside ``with Recording() as recording:``, those that
    failed and those of other tasks started inside included. It grows until it is left."""

    def __init__(self) -> None:
        self._steps: list[StepTrace] = []
        self._outer: list[StepTrace] | None = None
        self._token: Token[list[StepTrace] | None] | None = None

    @property
    def steps(self) -> Sequence[StepTrace]:
        """The outermost steps so far, in the order in which they began."""
        return self._steps

    def timeline(self, *, content: bool = False) -> Timeline:
        """The steps so far on one axis; see :class:`~dspark_agent.Timeline`.

        Raises:
            UserError: no step was taken.
        """
        from dspark_agent.timeline import timeline_of

        return timeline_of(self._steps, content=content)

    def __enter__(self) -> Self:
        if self._token is not None:
            raise UserError("a Recording records once; make another one")
        self._outer = _enclosing.get()
        self._token = _enclosing.set(self._steps)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._token is not None
        _enclosing.reset(self._token)
        if self._outer is not None:
            self._outer.extend(self._steps)
