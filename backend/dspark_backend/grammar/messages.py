"""Chat messages at the border: validated, and brought to the one form that templates expect."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, field_validator

from dspark_backend.errors import RequestError

ChatMessage: TypeAlias = Mapping[str, Any]
"""A message in the form of Hugging Face chat templates (which is OpenAI's): ``role``, ``content``
and, as they apply, ``tool_calls``, ``name``, ``tool_call_id``."""


class _TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class _Function(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    arguments: dict[str, Any] = {}

    @field_validator("arguments", mode="before")
    @classmethod
    def _parsed(cls, value: Any) -> Any:
        return json.loads(value) if isinstance(value, str) else value


class _ToolCall(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["function"] = "function"
    id: str | None = None
    function: _Function


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "user", "assistant", "tool"]
    content: str | list[_TextPart] | None = None
    reasoning_content: str | None = None
    tool_calls: list[_ToolCall] | None = None
    name: str | None = None
    tool_call_id: str | None = None

    @field_validator("content", mode="after")
    @classmethod
    def _joined(cls, value: str | list[_TextPart] | None) -> str:
        return "".join(part.text for part in value) if isinstance(value, list) else value or ""


_MESSAGES = TypeAdapter(list[_Message])


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """``messages`` as plain new dicts: content one string, tool arguments an object.

    Raises:
        RequestError: names the message and the field that is wrong.
    """
    try:
        checked = _MESSAGES.validate_python([dict(message) for message in messages])
    except (ValidationError, TypeError, ValueError) as error:
        raise RequestError(f"these are no chat messages: {_reason(error)}") from error
    result = []
    for message in checked:
        plain = message.model_dump(exclude_none=True)
        plain.setdefault("content", "")
        if not plain.get("tool_calls", True):
            del plain["tool_calls"]
        result.append(plain)
    return result


def all_strings(value: Any) -> Iterable[str]:
    """Every string inside ``value``, mapping keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield str(key)
            yield from all_strings(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from all_strings(part)


def _reason(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(str(step) for step in first["loc"])
    return f"at {place}: {first['msg']}"
