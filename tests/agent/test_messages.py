"""Messages serialise, and read as a model should read them."""

from __future__ import annotations

from datetime import date

import pytest
from pydantic import BaseModel, ValidationError

from dspark_agent import (
    ModelMessagesTypeAdapter,
    ModelRequest,
    ModelResponse,
    RequestUsage,
    RetryPromptPart,
    StepMetrics,
    SystemPromptPart,
    TextPart,
    ToolCallPart,
    ToolReturnPart,
    UserPromptPart,
)
from dspark_agent.models.chat import chat_messages, server_messages


class Found(BaseModel):
    path: str
    day: date


CALL = ToolCallPart(tool_name="read", args={"path": "a"}, tool_call_id="c1")
CONVERSATION: list[ModelRequest | ModelResponse] = [
    ModelRequest(parts=(SystemPromptPart(content="Be good."), UserPromptPart(content="Hi"))),
    ModelResponse(
        parts=(TextPart(content="Let me see."), CALL),
        model_name="m",
        usage=RequestUsage(input_tokens=3, output_tokens=4),
        metrics=StepMetrics(decode_s=1.5, total_s=1.5, proposed={"forced": 2}),
    ),
    ModelRequest(
        parts=(
            ToolReturnPart(tool_name="read", content={"n": 1}, tool_call_id="c1", note="again"),
            RetryPromptPart(content="bad", tool_name="read", tool_call_id="c2"),
            RetryPromptPart(content="too long"),
        )
    ),
]


def test_a_conversation_survives_json() -> None:
    text = ModelMessagesTypeAdapter.dump_json(CONVERSATION)
    assert ModelMessagesTypeAdapter.validate_json(text) == CONVERSATION


def test_what_a_tool_returned_serialises_whatever_it_is() -> None:
    content = [Found(path="a", day=date(2026, 1, 2)), object]
    part = ToolReturnPart(tool_name="find", content=content, tool_call_id="c")
    assert part.model_dump(mode="json")["content"] == [
        {"path": "a", "day": "2026-01-02"},
        "<class 'object'>",
    ]
    assert part.model_text().startswith('[{"path":"a","day":"2026-01-02"}')


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(ValidationError, match="kind"):
        ModelMessagesTypeAdapter.validate_json('[{"kind": "telegram", "parts": []}]')


def test_strings_reach_the_model_as_they_are_and_failures_say_so() -> None:
    done = ToolReturnPart(tool_name="t", content="a\nb", tool_call_id="c")
    failed = ToolReturnPart(tool_name="t", content="no disk", tool_call_id="c", outcome="failed")
    assert done.model_text() == "a\nb"
    assert failed.model_text() == "Failed: no disk"


def test_chat_form() -> None:
    chat = chat_messages(CONVERSATION)
    assert [message["role"] for message in chat] == [
        "system", "user", "assistant", "tool", "tool", "user",
    ]  # fmt: skip
    assert chat[2] == {
        "role": "assistant",
        "content": "Let me see.",
        "tool_calls": [
            {
                "type": "function",
                "id": "c1",
                "function": {"name": "read", "arguments": {"path": "a"}},
            }
        ],
    }
    assert chat[3] == {
        "role": "tool",
        "name": "read",
        "tool_call_id": "c1",
        "content": '{"n":1}\n\nagain',
    }
    assert chat[4]["content"].startswith("bad")
    assert chat[5]["content"].startswith("too long")


def test_servers_get_arguments_as_text_even_when_the_model_broke_them() -> None:
    broken = ModelResponse(parts=(ToolCallPart(tool_name="read", args='{"path": '),))
    for message, arguments in (
        (CONVERSATION[1], '{"path": "a"}'),
        (broken, '{"unreadable": "{\\"path\\": "}'),
    ):
        (chat,) = server_messages([message])
        assert chat["tool_calls"][0]["function"]["arguments"] == arguments
