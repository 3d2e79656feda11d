"""Span attributes of the GenAI semantic conventions, from the SDK's values.

https://opentelemetry.io/docs/specs/semconv/gen-ai/
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, assert_never

from opentelemetry.util.types import AttributeValue

from dspark_agent.limits import RequestUsage
from dspark_agent.messages import (
    FinishReason,
    ModelRequest,
    ModelResponse,
    RequestPart,
    RetryPromptPart,
    SystemPromptPart,
    TextPart,
    ToolCallPart,
    ToolReturnPart,
    UserPromptPart,
)
from dspark_agent.models.base import ModelTurn

Attributes = dict[str, AttributeValue]

_SETTINGS: Final = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "stop_sequences",
)


def request(turn: ModelTurn) -> Attributes:
    """What the model may emit, and how its tokens are chosen."""
    settings: Mapping[str, Any] = turn.settings
    attributes: Attributes = {
        f"gen_ai.request.{name}": settings[name] for name in _SETTINGS if name in settings
    }
    is_typed = turn.output_schema is not None and not turn.allow_text
    attributes["gen_ai.output.type"] = "json" if is_typed else "text"
    return attributes


def response(answer: ModelResponse) -> Attributes:
    """How the model answered, what it used, and who proposed its tokens."""
    attributes: Attributes = {
        "gen_ai.response.model": answer.model_name,
        "gen_ai.response.finish_reasons": [_finish_reason(answer.finish_reason)],
        "gen_ai.response.time_to_first_chunk": answer.metrics.ttft_s,
        **usage(answer.usage),
    }
    for source, tokens in answer.metrics.proposed.items():
        attributes[f"dspark.tokens.proposed.{source}"] = tokens
        attributes[f"dspark.tokens.accepted.{source}"] = answer.metrics.accepted.get(source, 0)
    return attributes


def usage(used: RequestUsage) -> Attributes:
    """Tokens read and written."""
    return {
        "gen_ai.usage.input_tokens": used.input_tokens,
        "gen_ai.usage.cache_read.input_tokens": used.cached_tokens,
        "gen_ai.usage.output_tokens": used.output_tokens,
    }


def told(messages: Sequence[ModelRequest | ModelResponse], turn: ModelTurn) -> Attributes:
    """Content: what the model is told with this turn, and the tools it may call."""
    system = [
        part.content
        for message in messages
        for part in message.parts
        if isinstance(part, SystemPromptPart)
    ]
    attributes: Attributes = {
        "gen_ai.input.messages": _json([m for message in messages for m in _input(message)]),
    }
    if system:
        attributes["gen_ai.system_instructions"] = _json([_text(text) for text in system])
    if turn.tools:
        attributes["gen_ai.tool.definitions"] = _json(
            [
                {
                    "type": "function",
                    "name": tool.name,
                    "description": tool.description,
                    "parameters": tool.parameters,
                }
                for tool in turn.tools
            ]
        )
    return attributes


def said(answer: ModelResponse) -> Attributes:
    """Content: what the model wrote."""
    message = _output(answer) | {"finish_reason": _finish_reason(answer.finish_reason)}
    return {"gen_ai.output.messages": _json([message])}


def _input(message: ModelRequest | ModelResponse) -> list[dict[str, Any]]:
    if isinstance(message, ModelResponse):
        return [_output(message)]
    return [_message(part) for part in message.parts if not isinstance(part, SystemPromptPart)]


def _message(part: RequestPart) -> dict[str, Any]:
    match part:
        case SystemPromptPart(content=content):
            return {"role": "system", "parts": [_text(content)]}
        case UserPromptPart(content=content):
            return {"role": "user", "parts": [_text(content)]}
        case RetryPromptPart(tool_call_id=None):
            return {"role": "user", "parts": [_text(part.model_text())]}
        case ToolReturnPart() | RetryPromptPart():
            returned = {
                "type": "tool_call_response",
                "id": part.tool_call_id,
                "response": part.model_text(),
            }
            return {"role": "tool", "parts": [returned]}
        case _:
            assert_never(part)


def _output(answer: ModelResponse) -> dict[str, Any]:
    return {"role": "assistant", "parts": [_written(part) for part in answer.parts]}


def _written(part: TextPart | ToolCallPart) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return _text(part.content)
    return {
        "type": "tool_call",
        "id": part.tool_call_id,
        "name": part.tool_name,
        "arguments": part.args,
    }


def _text(content: str) -> dict[str, Any]:
    return {"type": "text", "content": content}


def _finish_reason(reason: FinishReason) -> str:
    return "tool_calls" if reason is FinishReason.TOOL_CALL else reason.value


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
