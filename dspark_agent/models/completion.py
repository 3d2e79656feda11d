"""A streamed chat completion put together from its chunks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from dspark_agent.errors import ModelError
from dspark_agent.limits import RequestUsage
from dspark_agent.messages import FinishReason, ResponsePart, ToolCallPart, new_call_id
from dspark_agent.models.base import CallChunk, CallEnd, CallStart, ModelEvent, TextChunk
from dspark_agent.models.builder import ResponseBuilder


class _Function(BaseModel):
    name: str | None = None
    arguments: str | None = None


class _CallDelta(BaseModel):
    index: int = 0
    id: str | None = None
    function: _Function = Field(default_factory=_Function)


class _Delta(BaseModel):
    content: str | None = None
    refusal: str | None = None
    tool_calls: list[_CallDelta] | None = None


class _Choice(BaseModel):
    index: int = 0
    delta: _Delta = Field(default_factory=_Delta)
    finish_reason: str | None = None


class _CachedTokens(BaseModel):
    cached_tokens: int | None = None


class _Usage(BaseModel):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _CachedTokens | None = None


class _Chunk(BaseModel):
    choices: list[_Choice] = Field(default_factory=list)
    usage: _Usage | None = None
    error: Any = None


@dataclass(slots=True)
class _Call:
    id: str
    name: str
    arguments: list[str] = field(default_factory=list)

    def part(self) -> ToolCallPart:
        """The call; arguments that are no JSON object stay text."""
        text = "".join(self.arguments)
        try:
            args = json.loads(text or "{}")
        except ValueError:
            args = text
        if not isinstance(args, dict):
            args = text
        return ToolCallPart(tool_name=self.name, args=args, tool_call_id=self.id)


class Completion:
    """Takes the chunks in order; gives their events, and the whole at the end."""

    def __init__(self) -> None:
        self.finish_reason: FinishReason | None = None
        self.usage = RequestUsage()
        self._builder = ResponseBuilder()
        self._calls: dict[int, _Call] = {}
        self._finished = 0
        self._open: int | None = None

    def feed(self, data: str) -> Iterator[ModelEvent]:
        """The events of one chunk, a JSON text.

        Raises:
            ModelError: it is not a chunk, or the server reports an error in the stream.
        """
        try:
            chunk = _Chunk.model_validate_json(data)
        except ValidationError as error:
            raise ModelError(f"the server sent {data[:200]!r}, not a completion chunk") from error
        if chunk.error:
            raise ModelError(f"the server broke off: {json.dumps(chunk.error)}")
        if chunk.usage is not None:
            self._count(chunk.usage)
        for choice in chunk.choices:
            if choice.index == 0:
                yield from self._kept(self._choice(choice))

    def end(self) -> Iterator[ModelEvent]:
        """The events that only the end makes certain.

        Raises:
            ModelError: the stream stopped before the answer did.
        """
        yield from self._kept(self._close_call())
        if self.finish_reason is None:
            raise ModelError("the server's stream ended before the answer was finished")

    def parts(self) -> tuple[ResponsePart, ...]:
        """The answer's parts: the text, then the calls."""
        return self._builder.parts()

    def _kept(self, events: Iterator[ModelEvent]) -> Iterator[ModelEvent]:
        for event in events:
            self._builder.add(event)
            yield event

    def _choice(self, choice: _Choice) -> Iterator[ModelEvent]:
        text = choice.delta.content or choice.delta.refusal
        if text:
            yield TextChunk(text)
        for delta in choice.delta.tool_calls or ():
            yield from self._call(delta)
        if choice.finish_reason is not None:
            self.finish_reason = _FINISH.get(choice.finish_reason, FinishReason.ERROR)

    def _call(self, delta: _CallDelta) -> Iterator[ModelEvent]:
        if delta.index not in self._calls:
            if not delta.function.name:
                raise ModelError("the server sent a tool call without a name")
            yield from self._close_call()
            self._calls[delta.index] = _Call(delta.id or new_call_id(), delta.function.name)
            self._open = delta.index
            yield CallStart(self._finished, delta.function.name)
        if delta.function.arguments:
            self._calls[delta.index].arguments.append(delta.function.arguments)
            yield CallChunk(self._finished, delta.function.arguments)

    def _close_call(self) -> Iterator[ModelEvent]:
        if self._open is not None:
            part = self._calls[self._open].part()
            self._open = None
            yield CallEnd(self._finished, part)
            self._finished += 1

    def _count(self, usage: _Usage) -> None:
        details = usage.prompt_tokens_details
        self.usage = RequestUsage(
            input_tokens=usage.prompt_tokens,
            cached_tokens=(details.cached_tokens or 0) if details else 0,
            output_tokens=usage.completion_tokens,
        )


_FINISH = {
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "tool_calls": FinishReason.TOOL_CALL,
    "function_call": FinishReason.TOOL_CALL,
}
