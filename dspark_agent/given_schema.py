"""Arguments that a JSON Schema describes, not a Python signature."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any

from pydantic import AfterValidator, TypeAdapter

from dspark_agent.errors import SchemaError
from dspark_agent.function_schema import FunctionSchema, checked_place, without_titles
from dspark_agent.json_schema import JsonSchema, complaints


def given_schema(
    parameters: Mapping[str, Any], *, name: str | None, description: str, takes_ctx: bool
) -> FunctionSchema:
    """A function's schema from ``parameters``, which is checked and used as it is (titles apart).

    Raises:
        SchemaError: it is no JSON Schema of type object, or no name is given.
    """
    if name is None:
        raise SchemaError("a tool with parameters=... needs a name=... too")
    where = checked_place(name)
    if parameters.get("type") != "object":
        got = parameters.get("type")
        raise SchemaError(f"{where}: parameters is a schema of type 'object', not of type {got!r}")
    try:
        JsonSchema(parameters)
    except SchemaError as error:
        raise SchemaError(f"{where}: parameters: {error}") from error
    schema = {"properties": {}, **without_titles(dict(parameters))}
    arguments = Annotated[dict[str, Any], AfterValidator(partial(_checked, schema))]
    return FunctionSchema(
        name=name,
        description=description,
        parameters=schema,
        takes_ctx=takes_ctx,
        adapter=TypeAdapter(arguments),
        positional=(),
    )


def _checked(schema: Mapping[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    found = complaints(schema, arguments)
    if found:
        raise ValueError("; ".join(found))  # pydantic makes its ValidationError of it
    return arguments
