"""A run seen while it happens."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Generic, Self

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream
from typing_extensions import TypeVar

from dspark_agent.events import AgentEvent, PartialOutput, StepEnd, TextDelta
from dspark_agent.history import History
from dspark_agent.relay import EventHandler
from dspark_agent.run import AgentRun, RunResult

OutT = TypeVar("OutT", default=str)
ReadingT = TypeVar("ReadingT")
Start = Callable[[EventHandler], AbstractAsyncContextManager[AgentRun[Any, OutT]]]
"""Makes a run that tells a handler of its events."""


class EventStream(AsyncIterator[AgentEvent], Generic[OutT]):
    """The events of a run that goes on in the background, and then its result.

    Iterate it for the events: they end when the run does, not before (text is no sign that no
    tool call follows). When they end, :meth:`result` has what it came to. An error of the
    run is raised where the iteration (or the result) would have gone on.

    Leaving the ``async with`` early stops the model and the tools at once. The step in flight is
    undone; the steps whose StepEnd was sent stand, in :attr:`history`.
    """

    def __init__(self, events: MemoryObjectReceiveStream[AgentEvent]) -> None:
        self._events = events
        self._run: AgentRun[Any, OutT] | None = None
        self._results: list[RunResult[OutT]] = []
        self._failure: Exception | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> AgentEvent:
        try:
            return await self._events.__anext__()
        except StopAsyncIteration:
            if self._failure is not None:
                raise self._failure from None
            raise

    def stream_text(self, *, delta: bool = False) -> AsyncIterator[str]:
        """The text so far each time it grows (starting anew with each step); with ``delta``, only
        what was added."""
        text, step = "", -1

        def read(event: AgentEvent) -> str | None:
            nonlocal text, step
            if not isinstance(event, TextDelta):
                return None
            text = event.delta if event.step != step else text + event.delta
            step = event.step
            return event.delta if delta else text

        return _Readings(self, read)

    def stream_output(self) -> AsyncIterator[Any]:
        """The output each time it grows, and whole at the end.

        While it grows: the output type's reading (pydantic's partial mode) where there is one,
        else its JSON. Last comes the output itself, as its function and the output validators made
        it, unless it is what was seen last; plain text comes at the end only (see
        :meth:`stream_text`).
        """
        last: Any = None

        def read(event: AgentEvent) -> Any:
            nonlocal last
            reading = None
            if isinstance(event, PartialOutput):
                reading = event.data if event.value is None else event.value
            elif isinstance(event, StepEnd) and event.result.is_final:
                output = event.result.output
                reading = None if output == last else output
            last = last if reading is None else reading
            return reading

        return _Readings(self, read)

    @property
    def history(self) -> History:
        """The conversation of the steps that were done, to go on from; also after leaving early."""
        return History() if self._run is None else self._run.history

    async def result(self) -> RunResult[OutT]:
        """What the run came to; waits for it, passing over events nobody has read."""
        async for _ in self:
            pass
        return self._results[0]

    async def _work(self, start: Start[OutT], handler: EventHandler) -> None:
        try:
            async with start(handler) as self._run:
                async for _ in self._run:
                    pass
                self._results.append(self._run.result)
        except Exception as error:
            self._failure = error


class _Readings(AsyncIterator[ReadingT]):
    """What ``read`` makes of the events, those left out of which it makes None.

    Not an async generator: one that its reader leaves early would have to be closed.
    """

    def __init__(
        self, events: AsyncIterator[AgentEvent], read: Callable[[AgentEvent], ReadingT | None]
    ) -> None:
        self._events = events
        self._read = read

    async def __anext__(self) -> ReadingT:
        while True:
            reading = self._read(await self._events.__anext__())
            if reading is not None:
                return reading


@asynccontextmanager
async def streamed(
    start: Start[OutT],
) -> AsyncIterator[EventStream[OutT]]:
    """Drive the run that ``start`` makes with an event handler; leaving early cancels it."""
    # Unbounded: what a model writes is small, and a reader that pauses must not stall the engine.
    send, receive = anyio.create_memory_object_stream[AgentEvent](math.inf)
    stream = EventStream[OutT](receive)
    failure: Exception | None = None

    async def drive() -> None:
        with send:
            await stream._work(start, send.send)

    async with anyio.create_task_group() as group:
        group.start_soon(drive)
        with receive:
            try:
                yield stream
            except Exception as error:
                failure = error  # raised bare below: a task group would wrap it
        group.cancel_scope.cancel()
    if failure is not None:
        raise failure
