"""A JSON Schema and a validator for the arguments of a Python function.

The schema comes from the signature's annotations, the descriptions from its docstring (Google,
NumPy, Sphinx or epydoc style); ``Annotated[..., Field(...)]`` wins over the docstring.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NotRequired, cast, get_origin, get_type_hints

import docstring_parser
import pydantic_core
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from pydantic.fields import FieldInfo
from typing_extensions import TypedDict

from dspark_agent.context import RunContext
from dspark_agent.errors import SchemaError


@dataclass(frozen=True, slots=True)
class FunctionSchema:
    """How a function is described to a model, and how the model's arguments are checked.

    ``parameters`` is a JSON Schema of type object whose properties are in the signature's order.
    """

    name: str
    description: str
    parameters: dict[str, Any]
    takes_ctx: bool
    adapter: TypeAdapter[dict[str, Any]]
    positional: tuple[str, ...]

    def validate(self, args: Mapping[str, Any] | str) -> dict[str, Any]:
        """The arguments as the function's own types.

        Raises:
            ValidationError: pydantic's, when they do not fit the signature.
        """
        if isinstance(args, str):
            return self.adapter.validate_json(args or "{}")
        return self.adapter.validate_python(dict(args))

    def bind(self, arguments: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Split validated arguments into positional-only ones and keywords."""
        args = [arguments[name] for name in self.positional if name in arguments]
        kwargs = {k: v for k, v in arguments.items() if k not in self.positional}
        return args, kwargs


def function_schema(
    function: Callable[..., Any],
    *,
    name: str | None = None,
    description: str | None = None,
    takes_ctx: bool | None = None,
) -> FunctionSchema:
    """Describe ``function``; ``takes_ctx`` None looks at the first parameter's annotation.

    Raises:
        SchemaError: naming the parameter that cannot be described, and what to do.
    """
    name = name or str(getattr(function, "__name__", type(function).__name__))
    where = checked_place(name)
    hints = _hints(function, where)
    parameters = list(inspect.signature(function).parameters.values())
    if takes_ctx is None:
        takes_ctx = bool(parameters) and _is_context(hints.get(parameters[0].name))
    if takes_ctx:
        if not parameters:
            raise SchemaError(f"{where}: takes no RunContext; use tool_plain, or add `ctx`")
        parameters = parameters[1:]

    doc = docstring_parser.parse(inspect.getdoc(function) or "")
    told = {p.arg_name: p.description for p in doc.params if p.description}
    fields = {p.name: _field(p, hints, told.get(p.name), where) for p in parameters}
    adapter = _adapter(name, fields, where)
    return FunctionSchema(
        name=name,
        description=description if description is not None else _summary(doc),
        parameters=_parameters(adapter, where),
        takes_ctx=takes_ctx,
        adapter=adapter,
        positional=tuple(p.name for p in parameters if p.kind is p.POSITIONAL_ONLY),
    )


def checked_place(name: str) -> str:
    """How errors name the tool ``name``.

    Raises:
        SchemaError: no tool can have that name.
    """
    where = f"tool {name!r}"
    if not name.replace("-", "_").isidentifier():
        raise SchemaError(f"{where}: a tool's name is an identifier; pass name='...'")
    return where


def validation_text(error: ValidationError) -> str:
    """Pydantic's complaints as lines a model can act on: ``path: what is wrong (got ...)``."""
    lines = []
    for item in error.errors(include_url=False, include_context=False):
        path = ".".join(str(step) for step in item["loc"]) or "value"
        got = "" if item["type"] == "missing" else f" (got {_shortened(item['input'])})"
        lines.append(f"{path}: {item['msg']}{got}")
    return "\n".join(lines)


def without_titles(schema: Any) -> Any:
    """The schema without pydantic's generated ``title`` keywords, which only cost tokens."""
    if isinstance(schema, list):
        return [without_titles(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    cleaned: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "title" and isinstance(value, str):
            continue
        if key in ("properties", "$defs") and isinstance(value, dict):
            cleaned[key] = {name: without_titles(child) for name, child in value.items()}
        elif key in ("enum", "const", "default", "examples"):
            cleaned[key] = value
        else:
            cleaned[key] = without_titles(value)
    return cleaned


def _shortened(value: object, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def _hints(function: Callable[..., Any], where: str) -> dict[str, Any]:
    target = function if inspect.isroutine(function) else type(function).__call__
    try:
        return get_type_hints(target, include_extras=True)
    except (NameError, TypeError) as error:
        raise SchemaError(
            f"{where}: its annotations cannot be resolved ({error}); import the names at module "
            "level, not under TYPE_CHECKING"
        ) from error


def _is_context(annotation: object) -> bool:
    return annotation is RunContext or get_origin(annotation) is RunContext


def _field(
    parameter: inspect.Parameter, hints: Mapping[str, Any], told: str | None, where: str
) -> Any:
    name = parameter.name
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        raise SchemaError(
            f"{where}: {parameter} cannot be described to a model; name every parameter"
        )
    if name not in hints:
        raise SchemaError(f"{where}: parameter {name!r} has no type annotation; add one")
    annotation = hints[name]
    if _is_context(annotation):
        raise SchemaError(f"{where}: the RunContext must be the first parameter")
    own = [m for m in getattr(annotation, "__metadata__", ()) if isinstance(m, FieldInfo)]
    if told and not any(info.description for info in own):
        annotation = Annotated[annotation, Field(description=told)]
    if parameter.default is parameter.empty:
        return annotation
    try:
        default = pydantic_core.to_jsonable_python(parameter.default)
    except pydantic_core.PydanticSerializationError:
        return NotRequired[annotation]
    return NotRequired[Annotated[annotation, Field(json_schema_extra={"default": default})]]


def _adapter(name: str, fields: Mapping[str, Any], where: str) -> TypeAdapter[dict[str, Any]]:
    make_type = cast(Any, TypedDict)  # a type made at run time is beyond a type checker
    arguments = make_type(f"{name}_arguments", dict(fields))
    arguments.__pydantic_config__ = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
    try:
        return TypeAdapter(arguments)
    except PydanticUserError as error:
        raise SchemaError(f"{where}: {error.message}") from error


def _parameters(adapter: TypeAdapter[dict[str, Any]], where: str) -> dict[str, Any]:
    try:
        schema = adapter.json_schema()
    except PydanticUserError as error:
        raise SchemaError(f"{where}: {error.message}") from error
    cleaned: dict[str, Any] = without_titles(schema)
    cleaned.setdefault("properties", {})
    return cleaned


def _summary(doc: docstring_parser.Docstring) -> str:
    parts = [doc.short_description or "", doc.long_description or ""]
    return "\n\n".join(part for part in parts if part)
