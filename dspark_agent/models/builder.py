"""A response put together from the events of its turn."""

from __future__ import annotations

from typing import assert_never

from dspark_agent.messages import ResponsePart, TextPart, ToolCallPart
from dspark_agent.models.base import (
    CallChunk,
    CallEnd,
    CallStart,
    ModelEvent,
    TextChunk,
    TokensWritten,
)


class ResponseBuilder:
    """Takes a turn's events in order; has the response's parts at any time."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._calls: list[ToolCallPart] = []
        self._open_call: str | None = None
        self._arguments: list[str] = []

    def add(self, event: ModelEvent) -> None:
        """Take one event."""
        match event:
            case TextChunk(delta):
                self._text.append(delta)
            case CallStart(_, tool_name):
                self._open_call, self._arguments = tool_name, []
            case CallChunk(_, delta):
                self._arguments.append(delta)
            case CallEnd(_, call):
                self._open_call = None
                self._calls.append(call)
            case TokensWritten():
                pass  # who proposed what does not change the parts
            case _:
                assert_never(event)

    def parts(self) -> tuple[ResponsePart, ...]:
        """The text (an empty one where there is nothing else), then the calls; a call that broke
        off has the text of its arguments so far."""
        calls = list(self._calls)
        if self._open_call is not None:
            calls.append(ToolCallPart(tool_name=self._open_call, args="".join(self._arguments)))
        text = "".join(self._text)
        return (*((TextPart(content=text),) if text or not calls else ()), *calls)
