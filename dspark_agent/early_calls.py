"""Tool calls that run while the model is still writing the rest of its turn."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from contextvars import copy_context
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import anyio
from anyio.abc import TaskGroup

from dspark_agent.context import DepsT, RunContext
from dspark_agent.execution import CallOutcome, RetryCount, ToolRunner, WatchCall
from dspark_agent.messages import ModelResponse, ToolCallPart
from dspark_agent.models.base import CallEnd, ModelEvent
from dspark_agent.models.builder import ResponseBuilder
from dspark_agent.tools import ToolDefinition

if TYPE_CHECKING:
    from dspark_agent.session import Session


Forker = Callable[[], Awaitable["Session[Any, Any]"]]


class _Started:
    """A call on its way: ``outcome`` and ``seconds`` hold once ``over`` is set."""

    def __init__(self, call: ToolCallPart) -> None:
        self.call = call
        self.over = anyio.Event()
        self.outcome: CallOutcome | None = None
        self.seconds = 0.0


class EarlyCalls:
    """The calls of one turn that were started as soon as the model had written them.

    These are the turn's first calls, up to one that has to have the stage for itself
    (``sequential``), that may need approval, or that is none of the runner's: such a call and all
    after it wait for the end of the turn. Made by :func:`early_calls`.
    """

    def __init__(
        self,
        group: TaskGroup,
        run: Callable[[ToolCallPart, ModelResponse], Awaitable[CallOutcome]],
        may_start: Callable[[ToolCallPart], bool],
    ) -> None:
        self.failure: Exception | None = None
        self._group = group
        self._run = run
        self._may_start = may_start
        self._said = ResponseBuilder()
        self._started: dict[int, _Started] = {}
        self._held = False
        self._written = anyio.Event()
        self._context = copy_context()  # a call is part of the step, not of the model's turn

    def written(self) -> None:
        """The model has ended its turn: its session can be forked again."""
        self._written.set()

    def after(self, forker: Forker | None) -> Forker | None:
        """``forker``, once the turn is written."""
        if forker is None:
            return None

        async def fork() -> Session[Any, Any]:
            await self._written.wait()
            return await forker()

        return fork

    def hear(self, event: ModelEvent) -> None:
        """Take one event of the turn; a call that it completes starts, if it may."""
        self._said.add(event)
        if not isinstance(event, CallEnd):
            return
        self._held = self._held or not self._may_start(event.call)
        if not self._held:
            started = self._started[event.index] = _Started(event.call)
            so_far = ModelResponse(parts=self._said.parts())
            self._context.run(self._group.start_soon, self._guarded, self._run_one, started, so_far)

    async def result(self, index: int, call: ToolCallPart) -> tuple[CallOutcome, float] | None:
        """The result of the turn's ``index``-th call and the seconds it took; None where it was
        not started. Waits for it."""
        started = self._started.get(index)
        if started is None or started.call != call:
            return None
        await started.over.wait()
        assert started.outcome is not None
        return started.outcome, started.seconds

    @contextmanager
    def beside(self, work: Callable[[], Awaitable[None]]) -> Iterator[None]:
        """Do ``work`` beside what happens in here; cancelled when that is over."""
        scope = anyio.CancelScope()

        async def scoped() -> None:
            with scope:
                await work()

        self._group.start_soon(self._guarded, scoped)
        try:
            yield
        finally:
            scope.cancel()

    def fail(self, error: Exception) -> None:
        """End the turn and all of its calls with ``error``, unless they ended with another."""
        if self.failure is None:
            self.failure = error
        self._group.cancel_scope.cancel()

    async def _run_one(self, started: _Started, so_far: ModelResponse) -> None:
        began = time.perf_counter()
        started.outcome = await self._run(started.call, so_far)
        started.seconds = time.perf_counter() - began
        started.over.set()

    async def _guarded(self, work: Callable[..., Awaitable[None]], *args: object) -> None:
        try:
            await work(*args)
        except Exception as error:
            self.fail(error)


@asynccontextmanager
async def early_calls(
    runner: ToolRunner[DepsT],
    *,
    offered: Mapping[str, ToolDefinition],
    ctx: RunContext[DepsT],
    count: RetryCount,
    watch: WatchCall,
    allowed: bool,
) -> AsyncIterator[EarlyCalls]:
    """A turn and its calls: what is :meth:`EarlyCalls.hear`\\ d in here may start at once.

    ``offered``, ``count`` and ``watch`` as for :meth:`ToolRunner.run`; ``ctx.messages`` gets what
    the model has said so far, and ``ctx.fork()`` waits until the turn is over. Nothing starts early
    unless it is ``allowed``.

    Raises:
        Exception: whatever the body or a call raised first, bare; the other is cancelled.
    """

    def run(call: ToolCallPart, so_far: ModelResponse) -> Awaitable[CallOutcome]:
        own = replace(ctx, messages=(*ctx.messages, so_far), forker=early.after(ctx.forker))
        return runner.start_early(call, offered, own, count, watch)

    def may_start(call: ToolCallPart) -> bool:
        return allowed and runner.may_start_early(call)

    async with anyio.create_task_group() as group:
        early = EarlyCalls(group, run, may_start)
        try:
            yield early
        except Exception as error:
            early.fail(error)
    if early.failure is not None:
        raise early.failure
