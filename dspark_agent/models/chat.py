"""Messages in the chat form that templates and servers read: ``{"role": ..., "content": ...}``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, assert_never

from dspark_agent.messages import (
    ModelRequest,
    ModelResponse,
    RetryPromptPart,
    SystemPromptPart,
    ToolCallPart,
    ToolReturnPart,
    UserPromptPart,
)
from dspark_agent.tools import ToolDefinition

ChatMessage = dict[str, Any]


def chat_messages(messages: Sequence[ModelRequest | ModelResponse]) -> list[ChatMessage]:
    """The conversation with tool arguments as objects (chat templates).

    Arguments that were no JSON object are shown under the key ``unreadable``.
    """
    chat: list[ChatMessage] = []
    for message in messages:
        if isinstance(message, ModelRequest):
            chat.extend(_request(message))
        else:
            chat.append(_response(message))
    return chat


def server_messages(messages: Sequence[ModelRequest | ModelResponse]) -> list[ChatMessage]:
    """The conversation with tool arguments as JSON text (chat-completions servers)."""
    chat = chat_messages(messages)
    for message in chat:
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return chat


def function_tools(tools: Sequence[ToolDefinition]) -> tuple[Mapping[str, Any], ...]:
    """Tools in OpenAI's form."""
    return tuple(
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description,
                "parameters": dict(tool.parameters),
            },
        }
        for tool in tools
    )


def _request(message: ModelRequest) -> Iterator[ChatMessage]:
    for part in message.parts:
        match part:
            case SystemPromptPart():
                yield {"role": "system", "content": part.content}
            case UserPromptPart():
                yield {"role": "user", "content": part.content}
            case ToolReturnPart():
                yield _tool(part.tool_name, part.tool_call_id, part.model_text())
            case RetryPromptPart(tool_name=None):
                yield {"role": "user", "content": part.model_text()}
            case RetryPromptPart():
                yield _tool(part.tool_name, part.tool_call_id, part.model_text())
            case _:
                assert_never(part)


def _tool(name: str | None, call_id: str | None, text: str) -> ChatMessage:
    return {"role": "tool", "name": name, "tool_call_id": call_id, "content": text}


def _response(message: ModelResponse) -> ChatMessage:
    chat: ChatMessage = {"role": "assistant", "content": message.text}
    calls = [_call(call) for call in message.tool_calls]
    if calls:
        chat["tool_calls"] = calls
    return chat


def _call(call: ToolCallPart) -> dict[str, Any]:
    arguments = {"unreadable": call.args} if isinstance(call.args, str) else call.args
    return {
        "type": "function",
        "id": call.tool_call_id,
        "function": {"name": call.tool_name, "arguments": arguments},
    }
