"""Tools for models whose chat template has no place for them: described and written in words.

The tools go into the system message, calls are written in the Hermes form (``<tool_call>`` as
plain text), and tool results come back in a user message between ``<tool_response>`` marks. Where
a template has no place for a system message either, its text leads the first user message.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dspark_backend.grammar.callformat import HERMES

_INTRODUCTION = (
    "# Tools\n\n"
    "You may call functions to do the task. The signature of each function is one line of JSON"
    " within <tools></tools>:\n<tools>\n{tools}\n</tools>\n\n"
    "To call a function, answer with its name and its arguments as JSON within"
    " <tool_call></tool_call>:\n"
    '<tool_call>\n{{"name": <function-name>, "arguments": <args-json-object>}}\n</tool_call>'
)


def with_tools_in_words(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """``messages`` (validated) in roles that every template knows, ``tools`` in the first one."""
    result: list[dict[str, Any]] = []
    results: list[str] = []
    for message in messages:
        if message["role"] == "tool":
            results.append(_response(message))
            continue
        if results:
            result.append(_user(results))
            results = []
        result.append(_in_words(message))
    if results:
        result.append(_user(results))
    if tools:
        lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        introduction = _INTRODUCTION.format(tools=lines)
        if result and result[0]["role"] == "system":
            given = result[0]["content"]
            result[0] = {"role": "system", "content": f"{given}\n\n{introduction}"}
        else:
            result.insert(0, {"role": "system", "content": introduction})
    return result


def without_system(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """``messages`` (in words) for a template that refuses a system message at the start."""
    if not messages or messages[0]["role"] != "system":
        return list(messages)
    told, *rest = messages
    if rest and rest[0]["role"] == "user":
        content = f"{told['content']}\n\n{rest[0]['content']}"
        return [{"role": "user", "content": content}, *rest[1:]]
    return [{"role": "user", "content": told["content"]}, *rest]


def _in_words(message: Mapping[str, Any]) -> dict[str, Any]:
    parts = [message["content"]] if message["content"] else []
    for call in message.get("tool_calls", ()):
        function = call["function"]
        arguments = json.dumps(function["arguments"], ensure_ascii=False)
        parts.append(HERMES.call(function["name"], arguments))
    return {"role": message["role"], "content": "\n".join(parts)}


def _response(message: Mapping[str, Any]) -> str:
    return f"<tool_response>\n{message['content']}\n</tool_response>"


def _user(results: Sequence[str]) -> dict[str, Any]:
    return {"role": "user", "content": "\n".join(results)}
