"""What a step's answer must be: an output type as JSON Schema, and its validation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any, Generic, TypeVar, Union, get_args, get_origin

import jsonschema
import pydantic_core
import referencing
from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from dspark_agent.deferred import DeferredToolRequests
from dspark_agent.errors import ModelRetry, SchemaError
from dspark_agent.function_schema import validation_text, without_titles

T = TypeVar("T")
WRAPPED_KEY = "result"
"""The only key of the object around an output that is not an object itself."""


@dataclass(frozen=True, slots=True)
class JsonSchema:
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


@dataclass(frozen=True, slots=True)
class Partial:
    """A typed result that is still being written.

    ``data`` is the JSON so far, ``value`` the output type's reading of it, None while that is
    not possible (required fields are missing).
    """

    data: Any
    value: Any


class Output(Generic[T]):
    """An output type, ready to be asked for and checked.

    A union with ``str`` in it (``Plan | str``) means a typed result or plain text.

    ``schema`` is a JSON Schema of type object, or None where only text is asked for; ``allow_text``
    says whether plain text is an answer, ``allow_deferred`` whether the step may pause with
    :class:`DeferredToolRequests`, which the model is not told about.
    """

    def __init__(self, output_type: Any) -> None:
        options = _options(output_type)
        self.allow_deferred = DeferredToolRequests in options
        options = tuple(option for option in options if option is not DeferredToolRequests)
        if not options:
            raise SchemaError(
                "output_type=DeferredToolRequests is how a run pauses; say how it ends too, as in "
                "output_type=str | DeferredToolRequests"
            )
        typed = tuple(option for option in options if option is not str)
        self.allow_text = len(typed) < len(options)
        self.schema: dict[str, Any] | None = None
        self._wrapped = False
        self._adapter: TypeAdapter[Any] | None = None
        self._bare: JsonSchema | None = None
        if isinstance(output_type, JsonSchema):
            self._bare = output_type
            self._set_schema(dict(output_type.schema))
        elif typed:
            self._adapter = _adapter(typed)
            self._set_schema(without_titles(_schema(self._adapter)))

    def _set_schema(self, schema: dict[str, Any]) -> None:
        self._wrapped = not _describes_object(schema)
        self.schema = _wrap(schema) if self._wrapped else schema

    def validate(self, text: str) -> T:
        """The model's answer as the output type.

        Raises:
            ModelRetry: with what is wrong, in words for the model.
        """
        if self.schema is None:
            return text  # type: ignore[return-value]
        try:
            data = pydantic_core.from_json(text)
        except ValueError as error:
            if self.allow_text:
                return text  # type: ignore[return-value]
            raise ModelRetry(f"The answer is not valid JSON: {error}") from None
        if self.allow_text and not isinstance(data, dict):
            return text  # type: ignore[return-value]
        return self._validate_json(data)

    def _validate_json(self, data: Any) -> T:
        if self._wrapped:
            if not isinstance(data, dict) or WRAPPED_KEY not in data:
                raise ModelRetry(f'The answer must be {{"{WRAPPED_KEY}": ...}}')
            data = data[WRAPPED_KEY]
        if self._bare is not None:
            found = complaints(self._bare.schema, data)
            if found:
                raise ModelRetry("\n".join(found))
            return data  # type: ignore[no-any-return]
        assert self._adapter is not None
        try:
            return self._adapter.validate_json(json.dumps(data))  # type: ignore[no-any-return]
        except ValidationError as error:
            raise ModelRetry(validation_text(error)) from None

    def partial(self, text: str) -> Partial | None:
        """Read an answer that is still being written; None before there is anything to read."""
        if self.schema is None:
            return None
        try:
            data = pydantic_core.from_json(text, allow_partial="trailing-strings")
        except ValueError:
            return None
        if self._wrapped:
            if not isinstance(data, dict) or WRAPPED_KEY not in data:
                return None
            data = data[WRAPPED_KEY]
        if self._adapter is None:
            return Partial(data, data)
        try:
            value = self._adapter.validate_python(
                data, experimental_allow_partial="trailing-strings"
            )
        except ValidationError:
            value = None
        return Partial(data, value)


def _options(output_type: Any) -> tuple[Any, ...]:
    if get_origin(output_type) in (Union, UnionType):
        return get_args(output_type)
    return (output_type,)


def _adapter(types: tuple[Any, ...]) -> TypeAdapter[Any]:
    try:
        choice: Any = types[0] if len(types) == 1 else Union[types]  # noqa: UP007
        return TypeAdapter(choice)
    except PydanticUserError as error:
        raise SchemaError(f"output_type {types}: {error.message}") from error


def _schema(adapter: TypeAdapter[Any]) -> dict[str, Any]:
    try:
        return adapter.json_schema()
    except PydanticUserError as error:
        raise SchemaError(f"output_type: {error.message}") from error


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
