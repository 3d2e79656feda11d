"""A run seen while it happens."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Generic, Self

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream
from typing_extensions import TypeVar

from dspark_agent.events import AgentEvent, PartialOutput, TextDelta
from dspark_agent.relay import EventHandler

ResultT = TypeVar("ResultT")
ReadingT = TypeVar("ReadingT")


class EventStream(AsyncIterator[AgentEvent], Generic[ResultT]):
    """The events of work that goes on in the background, and then its result.

    Iterate it for the events; when they end, :meth:`result` has what the work came to. An error
    of the work is raised where the iteration (or the result) would have gone on.
    """

    def __init__(self, events: MemoryObjectReceiveStream[AgentEvent]) -> None:
        self._events = events
        self._results: list[ResultT] = []
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
        """The typed result each time it grows: the output type's reading where there is one yet
        (required fields may be missing), else its JSON."""

        def read(event: AgentEvent) -> Any:
            if not isinstance(event, PartialOutput):
                return None
            return event.data if event.value is None else event.value

        return _Readings(self, read)

    async def result(self) -> ResultT:
        """What the work came to; waits for it, passing over events nobody has read."""
        async for _ in self:
            pass
        return self._results[0]

    async def _work(
        self, work: Callable[[EventHandler], Coroutine[Any, Any, ResultT]], handler: EventHandler
    ) -> None:
        try:
            self._results.append(await work(handler))
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
    work: Callable[[EventHandler], Coroutine[Any, Any, ResultT]],
) -> AsyncIterator[EventStream[ResultT]]:
    """Start ``work`` with an event handler and give its events; leaving early cancels it."""
    # Unbounded: what a model writes is small, and a reader that pauses must not stall the engine.
    send, receive = anyio.create_memory_object_stream[AgentEvent](math.inf)
    stream = EventStream[ResultT](receive)
    failure: Exception | None = None

    async def drive() -> None:
        with send:
            await stream._work(work, send.send)

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
