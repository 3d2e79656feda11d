"""An answer as JSON: the schema a model is held to, and the reading of what it wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Union

import pydantic_core
from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from dspark_agent.errors import ModelRetry, SchemaError
from dspark_agent.function_schema import validation_text, without_titles
from dspark_agent.json_schema import JsonSchema, complaints, moved

WRAPPED_KEY = "result"
"""The only key of the object around an output that is not an object itself."""


@dataclass(frozen=True, slots=True)
class Partial:
    """A typed result that is still being written.

    ``data`` is the JSON so far, ``value`` the output type's reading of it, None while that is
    not possible (required fields are missing).
    """

    data: Any
    value: Any


class TypedOutput:
    """A type (or several, or a bare schema), ready to be asked for as JSON and checked.

    ``schema`` is a JSON Schema of type object: a type that is none stands under ``result`` in one.

    Raises:
        SchemaError: naming the type that cannot be described, and what is wrong with it.
    """

    def __init__(self, types: Sequence[Any]) -> None:
        bare = [option for option in types if isinstance(option, JsonSchema)]
        if bare and len(types) > 1:
            raise SchemaError(
                "output_type: a JsonSchema cannot be one of several types; put the choice into the "
                "schema (anyOf), or give each its own ToolOutput"
            )
        self._bare = bare[0] if bare else None
        self._adapter = None if bare else _adapter(tuple(types))
        if self._adapter is None:
            schema = dict(bare[0].schema)
        else:
            schema = without_titles(_schema(self._adapter, tuple(types)))
        self._wrapped = not _describes_object(schema)
        self.schema: dict[str, Any] = _wrap(schema) if self._wrapped else schema

    def of_text(self, text: str) -> Any:
        """The value that a JSON text stands for.

        Raises:
            ModelRetry: with what is wrong, in words for the model.
        """
        try:
            data = pydantic_core.from_json(text)
        except ValueError as error:
            raise ModelRetry(f"The answer is not valid JSON: {error}") from None
        return self.of_json(data)

    def of_json(self, data: Any) -> Any:
        """The value that JSON data stands for; raises as :meth:`of_text`."""
        if self._wrapped:
            if not isinstance(data, dict) or WRAPPED_KEY not in data:
                raise ModelRetry(f'The answer must be {{"{WRAPPED_KEY}": ...}}')
            data = data[WRAPPED_KEY]
        if self._bare is not None:
            found = complaints(self._bare.schema, data)
            if found:
                raise ModelRetry("\n".join(found))
            return data
        assert self._adapter is not None
        try:
            return self._adapter.validate_json(json.dumps(data))
        except ValidationError as error:
            raise ModelRetry(validation_text(error)) from None

    def partial(self, text: str) -> Partial | None:
        """Read a JSON text that is still being written; None before there is anything to read.

        TypedDicts, lists and dicts have a value while their last parts are missing (pydantic's
        partial mode); models and dataclasses once their required fields are there.
        """
        data = partial_json(text)
        if self._wrapped:
            if not isinstance(data, dict) or WRAPPED_KEY not in data:
                return None
            data = data[WRAPPED_KEY]
        if data is None:
            return None
        if self._adapter is None:
            return Partial(data, data)
        try:
            value = self._adapter.validate_python(
                data, experimental_allow_partial="trailing-strings"
            )
        except ValidationError:
            value = None
        return Partial(data, value)


def partial_json(text: str) -> Any:
    """What a JSON text that is still being written holds so far; None before it holds anything."""
    try:
        return pydantic_core.from_json(text, allow_partial="trailing-strings")
    except ValueError:
        return None


def type_name(option: Any) -> str:
    """What to call an output type in a message or a tool's name."""
    return str(getattr(option, "__name__", option))


def _adapter(types: tuple[Any, ...]) -> TypeAdapter[Any]:
    try:
        choice: Any = types[0] if len(types) == 1 else Union[types]  # noqa: UP007
        return TypeAdapter(choice)
    except (PydanticUserError, TypeError, NameError) as error:
        message = getattr(error, "message", error)
        raise SchemaError(f"output_type {_names(types)}: {message}") from error


def _schema(adapter: TypeAdapter[Any], types: tuple[Any, ...]) -> dict[str, Any]:
    try:
        return adapter.json_schema()
    except PydanticUserError as error:
        raise SchemaError(f"output_type {_names(types)}: {error.message}") from error


def _names(types: tuple[Any, ...]) -> str:
    return " | ".join(type_name(option) for option in types)


def _describes_object(schema: Mapping[str, Any]) -> bool:
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/$defs/"):
        return _describes_object(schema.get("$defs", {}).get(reference[len("#/$defs/") :], {}))
    return schema.get("type") == "object"


def _wrap(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {WRAPPED_KEY: moved(schema, f"#/properties/{WRAPPED_KEY}")},
        "required": [WRAPPED_KEY],
        "additionalProperties": False,
    }
