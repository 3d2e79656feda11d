"""What was said in a conversation: pydantic models that serialise, named as in pydantic-ai.

A :class:`ModelRequest` is what goes to the model, a :class:`ModelResponse` what it wrote.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, Literal
from uuid import uuid4

import pydantic_core
from pydantic import BaseModel, ConfigDict, Discriminator, Field, TypeAdapter, field_serializer

from dspark_agent.limits import RequestUsage
from dspark_agent.metrics import StepMetrics


def _now() -> datetime:
    return datetime.now(tz=UTC)


def new_call_id() -> str:
    """An identifier that ties a tool call to its result."""
    return f"call_{uuid4().hex[:12]}"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SystemPromptPart(_Part):
    """The agent's instructions."""

    content: str
    part_kind: Literal["system-prompt"] = "system-prompt"


class UserPromptPart(_Part):
    """What the user (or the step) asks."""

    content: str
    part_kind: Literal["user-prompt"] = "user-prompt"


class ToolReturnPart(_Part):
    """What a tool returned. ``note`` is the SDK's own remark to the model about the call."""

    tool_name: str
    content: Any
    tool_call_id: str
    outcome: Literal["success", "failed", "denied"] = "success"
    note: str | None = None
    part_kind: Literal["tool-return"] = "tool-return"

    @field_serializer("content")
    def _content_as_json(self, content: Any) -> Any:
        return pydantic_core.to_jsonable_python(content, fallback=str)

    def model_text(self) -> str:
        """The text the model reads: strings as they are, anything else as JSON."""
        text = content_text(self.content)
        if self.outcome == "failed":
            text = f"Failed: {text}"
        return text if self.note is None else f"{text}\n\n{self.note}"


class RetryPromptPart(_Part):
    """Why the model has to try again: bad arguments, a rejected output, a tool's complaint.

    ``tool_name`` is None where the output was rejected, not a call.
    """

    content: str
    tool_name: str | None = None
    tool_call_id: str | None = None
    note: str | None = None
    part_kind: Literal["retry-prompt"] = "retry-prompt"

    def model_text(self) -> str:
        """The text the model reads."""
        text = f"{self.content}\n\nFix this and try again."
        return text if self.note is None else f"{text} {self.note}"


class TextPart(_Part):
    """Text the model wrote; a typed result is the text of its JSON."""

    content: str
    part_kind: Literal["text"] = "text"


class ToolCallPart(_Part):
    """One tool call. ``args`` is the JSON object, or the raw text where it was not one."""

    tool_name: str
    args: dict[str, Any] | str = Field(default_factory=dict)
    tool_call_id: str = Field(default_factory=new_call_id)
    part_kind: Literal["tool-call"] = "tool-call"

    def args_json(self) -> str:
        """The arguments as JSON text (the raw text where it was not an object)."""
        return self.args if isinstance(self.args, str) else json.dumps(self.args)


RequestPart = Annotated[
    SystemPromptPart | UserPromptPart | ToolReturnPart | RetryPromptPart,
    Discriminator("part_kind"),
]
ResponsePart = Annotated[TextPart | ToolCallPart, Discriminator("part_kind")]


class FinishReason(StrEnum):
    """Why the model stopped writing."""

    STOP = "stop"
    TOOL_CALL = "tool_call"
    LENGTH = "length"
    ERROR = "error"


class ModelRequest(BaseModel):
    """One message to the model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    parts: tuple[RequestPart, ...]
    timestamp: datetime = Field(default_factory=_now)
    kind: Literal["request"] = "request"


class ModelResponse(BaseModel):
    """One message from the model, with what it cost."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    parts: tuple[ResponsePart, ...]
    model_name: str = ""
    usage: RequestUsage = Field(default_factory=RequestUsage)
    finish_reason: FinishReason = FinishReason.STOP
    metrics: StepMetrics = Field(default_factory=StepMetrics)
    timestamp: datetime = Field(default_factory=_now)
    kind: Literal["response"] = "response"

    @property
    def text(self) -> str:
        """All text parts together."""
        return "".join(part.content for part in self.parts if isinstance(part, TextPart))

    @property
    def tool_calls(self) -> list[ToolCallPart]:
        return [part for part in self.parts if isinstance(part, ToolCallPart)]


ModelMessage = Annotated[ModelRequest | ModelResponse, Discriminator("kind")]

ModelMessagesTypeAdapter: TypeAdapter[list[ModelRequest | ModelResponse]] = TypeAdapter(
    list[ModelMessage], config=ConfigDict(defer_build=True)
)
"""Reads and writes a list of messages as JSON."""


def content_text(content: object) -> str:
    """A tool's return value as the model reads it: strings as they are, the rest as JSON."""
    if isinstance(content, str):
        return content
    return pydantic_core.to_json(content, fallback=str).decode()


def open_calls(messages: Sequence[ModelRequest | ModelResponse]) -> list[ToolCallPart]:
    """The tool calls of the last response that the request after it has not answered (yet)."""
    last, answer = (
        messages[-2:] if len(messages) > 1 else (None, messages[-1] if messages else None)
    )
    if isinstance(answer, ModelResponse):
        return answer.tool_calls
    if not isinstance(last, ModelResponse) or answer is None:
        return []
    answered = answered_ids(answer)
    return [call for call in last.tool_calls if call.tool_call_id not in answered]


def answered_ids(request: ModelRequest) -> set[str | None]:
    """The ids of the calls that ``request`` answers."""
    return {
        part.tool_call_id
        for part in request.parts
        if isinstance(part, ToolReturnPart | RetryPromptPart)
    }
