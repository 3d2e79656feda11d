"""Who is told of an agent's work while it goes on, and how the SDK tells them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Protocol

from dspark_agent.messages import ModelRequest, ModelResponse, ToolCallPart
from dspark_agent.models.base import ModelTurn
from dspark_agent.step import StepKind
from dspark_agent.trace import RunTrace, StepTrace, ToolTrace, collected


class Observer(Protocol):
    """Gives a context manager around each piece of work; see :meth:`Agent.instrument`.

    Each is entered when the work begins and left when it ends, with its exception if it failed;
    the trace is filled in by then. What an observer raises ends the work.
    """

    def run(self, run: RunTrace) -> AbstractContextManager[None]:
        """Around a whole run."""
        ...

    def step(self, step: StepTrace) -> AbstractContextManager[None]:
        """Around one model turn and the tools that it called."""
        ...

    def turn(
        self, step: StepTrace, messages: Sequence[ModelRequest | ModelResponse], turn: ModelTurn
    ) -> AbstractContextManager[None]:
        """Around the model's part of a step: it is told ``messages``, and may emit ``turn``."""
        ...

    def tool(self, tool: ToolTrace) -> AbstractContextManager[None]:
        """Around one tool call."""
        ...


_inherited: ContextVar[tuple[Observer, ...]] = ContextVar("dspark_agent_observers", default=())


@dataclass(frozen=True, slots=True)
class Watch:
    """The work of one conversation, told to its agent's observers and to those of the agents in
    whose tools it goes on."""

    agent: str
    model: str
    provider: str
    conversation_id: str
    own: Sequence[Observer] = ()

    @property
    def observers(self) -> tuple[Observer, ...]:
        outer = _inherited.get()
        return (*outer, *(observer for observer in self.own if observer not in outer))

    def handed_over(self, to: Watch) -> Watch:
        """The same conversation, gone on with by ``to``'s agent; told to both agents' observers."""
        added = tuple(observer for observer in to.own if observer not in self.own)
        return replace(to, conversation_id=self.conversation_id, own=(*self.own, *added))

    @contextmanager
    def run(self) -> Iterator[RunTrace]:
        """Around a run; the caller sets the trace's usage."""
        trace = RunTrace(self.agent, self.model, self.provider, self.conversation_id)
        with self._told(lambda observer: observer.run(trace)):
            yield trace

    @contextmanager
    def step(self, index: int, kind: StepKind, attempt: int) -> Iterator[StepTrace]:
        """Around a step; the caller fills in what became of it."""
        trace = StepTrace(
            self.agent, self.model, self.provider, self.conversation_id, index, kind, attempt
        )
        token = _inherited.set(self.observers)
        try:
            told = self._told(lambda observer: observer.step(trace))
            with collected(trace), told, _timed(trace):
                yield trace
        finally:
            _inherited.reset(token)

    @contextmanager
    def turn(
        self, trace: StepTrace, messages: Sequence[ModelRequest | ModelResponse], turn: ModelTurn
    ) -> Iterator[None]:
        """Around the model's part of a step."""
        with self._told(lambda observer: observer.turn(trace, messages, turn)):
            yield

    @contextmanager
    def tool(self, step: StepTrace, call: ToolCallPart) -> Iterator[ToolTrace]:
        """Around a call; the caller sets its result."""
        trace = ToolTrace(call)
        step.tools.append(trace)
        with self._told(lambda observer: observer.tool(trace)):
            try:
                yield trace
            finally:
                trace.ended = time.perf_counter()

    @contextmanager
    def _told(self, around: Callable[[Observer], AbstractContextManager[None]]) -> Iterator[None]:
        with ExitStack() as stack:
            for observer in self.observers:
                stack.enter_context(around(observer))
            yield


@contextmanager
def _timed(trace: StepTrace) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        trace.error = type(error).__name__ if isinstance(error, Exception) else "cancelled"
        raise
    finally:
        trace.ended = time.perf_counter()
