"""A JSON Schema in a line or two: what a small model has to know to fill in an object.

The grammar enforces the schema; the outline only says what is wanted, in a tenth of its tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_MAX_DEPTH = 6


def outline(schema: Mapping[str, Any]) -> str:
    """The shape of the values of ``schema``, with descriptions.

    >>> outline({"type": "object", "properties": {"n": {"type": "integer", "description": "size"}}})
    '{"n": integer (size)}'
    """
    return _Outliner(schema).shape(schema, 0)


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
