"""A bare JSON Schema as output type, and what jsonschema says about a value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jsonschema
import referencing

from dspark_agent.errors import SchemaError
from dspark_agent.outputs import OutputForm


@dataclass(frozen=True, slots=True)
class JsonSchema(OutputForm[Any]):
    """A bare JSON Schema as output type: the output is what the JSON says (Any).

    It is validated with jsonschema (the draft that ``$schema`` names; 2020-12 by default).

    Raises:
        SchemaError: it is not a valid JSON Schema.
    """

    schema: Mapping[str, Any]

    def __post_init__(self) -> None:
        try:
            jsonschema.validators.validator_for(self.schema).check_schema(self.schema)
        except jsonschema.SchemaError as error:
            path = "/".join(str(step) for step in error.absolute_path) or "its root"
            raise SchemaError(f"JsonSchema: {error.message} (at {path})") from error
        _check_references(self.schema, self.schema)


def moved(schema: Any, pointer: str) -> Any:
    """``schema`` with its references (JSON pointers) leading below ``pointer``."""
    if isinstance(schema, list):
        return [moved(item, pointer) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    result = {key: moved(value, pointer) for key, value in schema.items()}
    if isinstance(schema.get("$ref"), str):
        result["$ref"] = pointer + schema["$ref"].removeprefix("#")
    return result


def _check_references(schema: Any, root: Mapping[str, Any]) -> None:
    """Raise :class:`SchemaError` for a reference that does not lead to a place in ``root``."""
    if isinstance(schema, list):
        for item in schema:
            _check_references(item, root)
    if not isinstance(schema, Mapping):
        return
    reference = schema.get("$ref")
    if isinstance(reference, str):
        node: Any = root
        for step in reference.split("/")[1:]:
            node = node.get(step) if isinstance(node, Mapping) else None
        if not reference.startswith("#") or node is None:
            raise SchemaError(
                f"JsonSchema: $ref {reference!r} leads to no place in the schema; write it as "
                "'#/$defs/...'"
            )
    for value in schema.values():
        _check_references(value, root)


def complaints(schema: Mapping[str, Any], value: Any) -> list[str]:
    """What jsonschema finds wrong with ``value``: ``path: what``, in the order of the paths.

    References are looked up in ``schema`` only, never fetched.
    """
    checker = jsonschema.validators.validator_for(schema)
    validator = checker(schema, registry=referencing.Registry())
    errors = sorted(validator.iter_errors(value), key=lambda error: error.json_path)
    return [f"{error.json_path}: {error.message}" for error in errors]
