"""Tools with some of their arguments decided by the caller: the narrowest of steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pydantic_core

from dspark_agent.errors import UserError
from dspark_agent.json_schema import JsonSchema, moved
from dspark_agent.tools import ToolDefinition


def narrowed(tool: ToolDefinition, args: Mapping[str, Any]) -> ToolDefinition:
    """``tool`` with the parameters in ``args`` fixed to a value, or limited by a JsonSchema.

    What is fixed costs the embedded model nothing: the grammar forces it.

    Raises:
        UserError: the tool has no such parameter, or the value is no JSON.
    """
    properties = dict(tool.parameters.get("properties", {}))
    for name, value in args.items():
        if name not in properties:
            there_are = ", ".join(properties) or "none"
            raise UserError(f"tool {tool.name!r} has no parameter {name!r}; it has: {there_are}")
        properties[name] = _limited(tool.name, name, value)
    required = [
        name for name in properties if name in args or name in tool.parameters.get("required", ())
    ]
    parameters = {**tool.parameters, "properties": properties, "required": required}
    return ToolDefinition(tool.name, tool.description, parameters)


def _limited(tool: str, name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, JsonSchema):
        limited: dict[str, Any] = moved(value.schema, f"#/properties/{name}")
        return limited
    try:
        return {"const": pydantic_core.to_jsonable_python(value)}
    except pydantic_core.PydanticSerializationError as error:
        raise UserError(f"args: {tool}.{name}={value!r} is no JSON value: {error}") from error
