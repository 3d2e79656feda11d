"""From the model's events to the caller's."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import Any, assert_never

from dspark_agent.events import (
    AgentEvent,
    PartialOutput,
    TextDelta,
    ToolCallDelta,
    ToolCallEnd,
    ToolCallStart,
)
from dspark_agent.models.base import (
    CallChunk,
    CallEnd,
    CallStart,
    ModelEvent,
    TextChunk,
    TokensWritten,
)
from dspark_agent.output import Output
from dspark_agent.trace import StepTrace
from dspark_agent.typed_output import Partial

EventHandler = Callable[[AgentEvent], Awaitable[None] | None]
"""A caller's listener, sync or async; it is awaited, so a slow one slows the run."""


class EventRelay:
    """Gives one turn's events to the caller's handler, with the typed result read as it grows, and
    notes in the step's trace (if any) who proposed its tokens."""

    def __init__(
        self,
        handler: EventHandler | None,
        step: int,
        output: Output[Any],
        trace: StepTrace | None = None,
    ) -> None:
        self._handler = handler
        self._trace = trace
        self.step = step
        self._output = output
        self._read = output.partial
        self._text = ""
        self._partial: Partial | None = None

    async def send(self, event: AgentEvent) -> None:
        """Hand ``event`` to the caller's handler, if there is one."""
        if self._handler is None:
            return
        answer = self._handler(event)
        if inspect.isawaitable(answer):
            await answer

    async def on_model(self, event: ModelEvent) -> None:
        """Hand on what the model session emits."""
        if isinstance(event, TokensWritten):
            if self._trace is not None:
                self._trace.wrote(event.source, event.tokens, event.text)
            return
        if self._handler is None:
            return
        match event:
            case TextChunk(delta):
                await self.send(TextDelta(self.step, delta))
                await self._send_partial(delta)
            case CallStart(index, tool_name):
                await self.send(ToolCallStart(self.step, index, tool_name))
                final = self._output.tools.get(tool_name)
                self._read = _unread if final is None else final.partial
                self._text = ""
            case CallChunk(index, delta):
                await self.send(ToolCallDelta(self.step, index, delta))
                await self._send_partial(delta)
            case CallEnd(index, call):
                await self.send(ToolCallEnd(self.step, index, call))
            case _:
                assert_never(event)

    async def _send_partial(self, delta: str) -> None:
        self._text += delta
        partial = self._read(self._text)
        if partial is not None and partial != self._partial:
            self._partial = partial
            await self.send(PartialOutput(self.step, partial.data, partial.value))


def _unread(text: str) -> Partial | None:
    """The arguments of a call that is not the answer."""
    return None
