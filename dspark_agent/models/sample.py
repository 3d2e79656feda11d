"""The smallest value that satisfies a JSON Schema: what :class:`TestModel` writes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dspark_agent.errors import SchemaError

_FORMATS = {
    "date": "2000-01-01",
    "time": "00:00:00Z",
    "date-time": "2000-01-01T00:00:00Z",
    "duration": "PT1S",
    "email": "a@example.com",
    "uri": "https://example.com/",
    "uuid": "00000000-0000-4000-8000-000000000000",
    "ipv4": "127.0.0.1",
    "ipv6": "::1",
}


def sample(schema: Mapping[str, Any], *, seed: int = 0) -> Any:
    """A value for ``schema``; ``seed`` varies strings and numbers within their bounds.

    Covers what pydantic writes for ordinary types; ``pattern`` is beyond it.

    Raises:
        SchemaError: a reference leads nowhere.
    """
    return _Sampler(schema, seed).value(schema)


class _Sampler:
    def __init__(self, root: Mapping[str, Any], seed: int) -> None:
        self.root = root
        self.seed = seed

    def value(self, schema: Mapping[str, Any] | bool) -> Any:
        if isinstance(schema, bool) or not schema:
            return "a"
        for keyword in ("const", "default"):
            if keyword in schema:
                return schema[keyword]
        if schema.get("enum"):
            return schema["enum"][self.seed % len(schema["enum"])]
        if "$ref" in schema:
            return self.value(self._resolve(schema["$ref"]))
        for keyword in ("anyOf", "oneOf"):
            if schema.get(keyword):
                return self.value(schema[keyword][0])
        if schema.get("allOf"):
            return self.value({k: v for part in schema["allOf"] for k, v in part.items()})
        kind = schema.get("type", "object" if "properties" in schema else "string")
        return self._typed(kind[0] if isinstance(kind, list) else kind, schema)

    def _typed(self, kind: str, schema: Mapping[str, Any]) -> Any:
        match kind:
            case "object":
                required = schema.get("required", ())
                return {k: self.value(v) for k, v in schema.get("properties", {}).items()
                        if k in required}  # fmt: skip
            case "array":
                return self._array(schema)
            case "integer" | "number":
                return self._number(schema, whole=kind == "integer")
            case "boolean":
                return self.seed % 2 == 1
            case "null":
                return None
            case _:
                return self._string(schema)

    def _array(self, schema: Mapping[str, Any]) -> list[Any]:
        items = [self.value(item) for item in schema.get("prefixItems", ())]
        while len(items) < schema.get("minItems", 0):
            items.append(_Sampler(self.root, self.seed + len(items)).value(schema.get("items", {})))
        return items

    def _number(self, schema: Mapping[str, Any], *, whole: bool) -> float:
        low = schema.get("minimum", -math.inf)
        high = schema.get("maximum", math.inf)
        if "exclusiveMinimum" in schema:
            low = max(low, schema["exclusiveMinimum"] + (1 if whole else 1e-3))
        if "exclusiveMaximum" in schema:
            high = min(high, schema["exclusiveMaximum"] - (1 if whole else 1e-3))
        number = min(max(self.seed, low), high)
        step = schema.get("multipleOf")
        if step:
            number = math.ceil(number / step) * step
        return int(number) if whole else float(number)

    def _string(self, schema: Mapping[str, Any]) -> str:
        if schema.get("format") in _FORMATS:
            return _FORMATS[schema["format"]]
        text = chr(ord("a") + self.seed % 26)
        text = text.ljust(schema.get("minLength", 0), text)
        return text[: schema.get("maxLength", len(text))]

    def _resolve(self, reference: str) -> Mapping[str, Any]:
        node: Any = self.root
        for step in reference.removeprefix("#/").split("/"):
            if not isinstance(node, Mapping) or step not in node:
                raise SchemaError(f"$ref {reference!r} leads nowhere in the schema")
            node = node[step]
        return node  # type: ignore[no-any-return]
