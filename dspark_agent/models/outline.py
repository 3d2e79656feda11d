"""A JSON Schema in a line or two: what a small model has to know to fill in an object.

The grammar enforces the schema; the outline only says what is wanted, in a tenth of its tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dspark_agent.models.base import ModelTurn
from dspark_agent.models.chat import ChatMessage

_MAX_DEPTH = 6


def outline(schema: Mapping[str, Any]) -> str:
    """The shape of the values of ``schema``, with descriptions.

    >>> outline({"type": "object", "properties": {"n": {"type": "integer", "description": "size"}}})
    '{"n": integer (size)}'
    """
    return _Outliner(schema).shape(schema, 0)


def ask_for_result(
    chat: list[ChatMessage],
    turn: ModelTurn,
    told: frozenset[str] = frozenset(),
    log_text: str = "",
) -> frozenset[str]:
    """Say at the end of ``chat`` what the turn's typed result looks like, if it has one.

    An outline in ``told``, or in the text of the log that the conversation was restored from, is
    not said again: a conversation needs it once. Gives ``told`` with the turn's.
    """
    if turn.output_schema is None:
        return told
    shape = outline(turn.output_schema)
    if shape in told or shape in log_text:
        return told | {shape}
    when = "When you are done, answer" if turn.tools else "Answer"
    how = "in words or with JSON" if turn.allow_text else "with JSON"
    request = f"{when} {how}: {shape}"
    if chat and chat[-1]["role"] == "user":
        chat[-1]["content"] += f"\n\n{request}"
    else:
        chat.append({"role": "user", "content": request})
    return told | {shape}


class _Outliner:
    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root

    def shape(self, schema: Any, depth: int) -> str:
        if not isinstance(schema, Mapping) or not schema or depth > _MAX_DEPTH:
            return "any"
        text = self._bare(schema, depth)
        told = schema.get("description")
        return f"{text} ({' '.join(str(told).split())})" if told and depth else text

    def _bare(self, schema: Mapping[str, Any], depth: int) -> str:
        if "$ref" in schema:
            return self.shape(self._resolve(str(schema["$ref"])), depth)
        if "const" in schema:
            return json.dumps(schema["const"])
        if "enum" in schema:
            return " | ".join(json.dumps(value) for value in schema["enum"])
        for keyword in ("anyOf", "oneOf"):
            if keyword in schema:
                return " | ".join(self.shape(option, depth + 1) for option in schema[keyword])
        kind = schema.get("type", "object" if "properties" in schema else "any")
        if isinstance(kind, list):
            return " | ".join(kind)
        if kind == "array":
            return f"[{self.shape(schema.get('items', {}), depth + 1)}, ...]"
        if kind == "object" and "properties" in schema:
            fields = schema["properties"].items()
            return "{" + ", ".join(f'"{k}": {self.shape(v, depth + 1)}' for k, v in fields) + "}"
        return str(kind)

    def _resolve(self, reference: str) -> Any:
        node: Any = self._root
        for step in reference.removeprefix("#/").split("/"):
            node = node.get(step, {}) if isinstance(node, Mapping) else {}
        return node
