"""JSON Schema at the border: what a grammar can honour, checked and put into one form.

A schema that the grammar compiler would read differently from the JSON Schema standard is refused
with the keyword and its path; nothing is dropped but annotations. Objects that declare their
properties and say nothing of others are closed, which only narrows what a schema allows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dspark_backend.errors import GrammarError

SCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions")
"""Keywords whose value maps names to schemas."""
SCHEMA_LISTS = ("prefixItems", "anyOf", "oneOf", "allOf")
"""Keywords whose value is a list of schemas."""
SCHEMAS = ("items", "additionalProperties")
"""Keywords whose value is one schema."""

_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_COUNTS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")
_OTHERS = ("$ref", "const", "enum", "type", "required", "pattern", "format")
_CONSTRAINTS = frozenset(_NUMBERS + _COUNTS + _OTHERS)
_MEANINGS = ("$comment", "$schema", "title", "description", "default", "example", "examples")
_MARKS = ("deprecated", "readOnly", "writeOnly", "discriminator")
_ANNOTATIONS = frozenset(_MEANINGS + _MARKS)
_TYPES = frozenset(("object", "array", "string", "number", "integer", "boolean", "null"))
# Names that annotate a string without limiting its characters.
_ANNOTATING_FORMATS = ("path", "file-path", "directory-path", "password")
_MAX_DEPTH = 128
_ALTERNATIVES = frozenset(("$ref", "anyOf", "oneOf"))

LAYOUT: Mapping[str, Any] = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}
"""Separators of every JSON text a grammar allows: those of ``json.dumps`` and of chat templates."""


def json_rule(schema: Any) -> str:
    """The Lark expression for the values of a *normalised* schema, in the fixed layout."""
    if schema is True:
        schema = {}
    elif schema is False:
        raise GrammarError("the schema `false` allows no value at all")
    return "%json " + json.dumps({**schema, "x-guidance": LAYOUT}, ensure_ascii=False)


def normalise(
    schema: Mapping[str, Any], where: str = "$", *, pointer: str = "", whole: bool = True
) -> dict[str, Any]:
    """A checked copy of ``schema`` without annotations, its objects closed where that is safe.

    ``where`` names the schema in errors. ``pointer`` is where the copy will stand inside a larger
    schema: references are moved there. ``whole`` is off for a part whose references lead out of it.

    Raises:
        GrammarError: names a keyword that is unknown, unsupported or malformed, and its path.
    """
    if not isinstance(schema, Mapping):
        raise GrammarError(f"{where} is not a JSON Schema object but {type(schema).__name__}")
    return _Normaliser(schema, where, pointer, whole).copy(schema, where)


class _Normaliser:
    """One pass over one schema document."""

    def __init__(self, root: Mapping[str, Any], where: str, pointer: str, whole: bool) -> None:
        self._root = root
        self._pointer = pointer
        self._whole = whole
        self._closes = not _combines(root, where)

    def copy(self, schema: Mapping[str, Any], where: str) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for keyword, value in schema.items():
            at = f"{where}.{keyword}"
            if keyword in SCHEMA_MAPS:
                _require(isinstance(value, Mapping), at, "must map names to schemas")
                result[keyword] = {
                    name: self._sub(part, f"{at}.{name}") for name, part in value.items()
                }
            elif keyword in SCHEMA_LISTS:
                _require(isinstance(value, list) and bool(value), at, "must be a list of schemas")
                if keyword == "oneOf" and "anyOf" not in schema and self._tagged(value):
                    keyword = "anyOf"
                result[keyword] = [
                    self._sub(part, f"{at}[{place}]") for place, part in enumerate(value)
                ]
            elif keyword in SCHEMAS:
                result[keyword] = self._sub(value, at)
            elif keyword in _CONSTRAINTS:
                self._constraint(result, keyword, value, at)
            elif not (
                keyword in _ANNOTATIONS
                or keyword.startswith("x-")
                or (keyword == "$id" and schema is self._root)
            ):
                raise GrammarError(
                    f"{at}: the keyword {keyword!r} cannot be enforced while generating; remove it"
                    " and check it in an output validator"
                )
        if self._closes and _is_open_record(result):
            result["additionalProperties"] = False
        _require(
            result.get("additionalProperties", True) is False
            or result.get("minProperties", 0) <= len(result.get("required", ())) + 1,
            f"{where}.minProperties",
            "cannot be enforced here: names beyond those in 'required' might repeat",
        )
        return result

    def _sub(self, schema: Any, where: str) -> Any:
        if isinstance(schema, bool):
            return schema
        _require(isinstance(schema, Mapping), where, "must be a schema (an object or a boolean)")
        return self.copy(schema, where)

    def _constraint(self, result: dict[str, Any], keyword: str, value: Any, at: str) -> None:
        if keyword == "$ref":
            _require(isinstance(value, str) and value.startswith("#"), at, "must start with '#'")
            _require(not self._whole or self._resolves(value), at, f"leads nowhere: {value!r}")
            value = "#" + self._pointer + value[1:]
        elif keyword == "format" and value in _ANNOTATING_FORMATS:
            return
        else:
            _check_form(keyword, value, at)
        result[keyword] = value

    def _tagged(self, alternatives: list[Any]) -> bool:
        """Whether a property that every alternative requires tells them apart by its value, so
        that "exactly one" says no more than "any"."""
        tables = [self._tags(part) for part in alternatives]
        for name in set.intersection(*(set(table) for table in tables)):
            tags = [tag for table in tables for tag in table[name]]
            if len(tags) == len(set(tags)):
                return True
        return False

    def _tags(self, schema: Any) -> dict[str, set[str]]:
        """The required properties of an object whose values are given strings, with those."""
        record = self._behind(schema)
        properties, required = record.get("properties"), record.get("required")
        if not isinstance(properties, Mapping) or not isinstance(required, list):
            return {}
        tags = {}
        for name in set(properties).intersection(map(str, required)):
            values = self._behind(properties[name])
            given = values.get("enum", [values.get("const")])
            if isinstance(given, list) and all(isinstance(value, str) for value in given):
                tags[name] = set(given)
        return tags

    def _behind(self, schema: Any) -> Mapping[str, Any]:
        """The schema that a chain of references ends at; empty for what is no schema."""
        for _ in range(_MAX_DEPTH):
            if not isinstance(schema, Mapping):
                break
            if not isinstance(schema.get("$ref"), str):
                return schema
            schema = resolve(self._root, schema["$ref"]) if self._resolves(schema["$ref"]) else {}
        return {}

    def _resolves(self, reference: str) -> bool:
        try:
            resolve(self._root, reference)
        except (LookupError, TypeError, ValueError):
            return False
        return True


def resolve(root: Any, reference: str) -> Any:
    """The part of ``root`` that a local reference (``#/$defs/Node``) points at.

    Raises:
        LookupError, TypeError, ValueError: it points at nothing.
    """
    part = root
    for step in reference.removeprefix("#").split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        part = part[int(name)] if isinstance(part, list) else part[name]
    return part


def first_characters(schema: Any, root: Any = None, _seen: frozenset[str] = frozenset()) -> str:
    """The characters that a value of a *normalised* schema may begin with (a superset)."""
    everything = '{["-0123456789tfn'
    if not isinstance(schema, Mapping):
        return everything
    root = schema if root is None else root
    if "const" in schema or "enum" in schema:
        values = [schema["const"]] if "const" in schema else schema["enum"]
        return "".join({json.dumps(value)[0] for value in values})
    if "type" in schema:
        names = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        digits = "-0123456789"
        starts = {"object": "{", "array": "[", "string": '"', "boolean": "tf", "null": "n"}
        return "".join(starts.get(name, digits) for name in names)
    if "$ref" in schema and schema["$ref"] not in _seen:
        seen = _seen | {schema["$ref"]}
        return first_characters(resolve(root, schema["$ref"]), root, seen)
    for keyword in ("anyOf", "oneOf"):
        if keyword in schema:
            parts = (first_characters(part, root, _seen) for part in schema[keyword])
            return "".join(sorted(set("".join(parts))))
    return everything


def _combines(root: Mapping[str, Any], where: str) -> bool:
    """Whether properties of one object may be declared in several places, so that closing one of
    them would forbid the others. Refuses a document whose depth would exhaust the stack."""
    level: list[Any] = [root]
    combines = False
    for _ in range(_MAX_DEPTH):
        schemas = [part for part in level if isinstance(part, Mapping)]
        for schema in schemas:
            beside = "properties" in schema and not _ALTERNATIVES.isdisjoint(schema)
            combines = combines or beside or "allOf" in schema
        level = [part for schema in schemas for part in schema.values()]
        level += [part for parts in level if isinstance(parts, list) for part in parts]
        if not level:
            return combines
    raise GrammarError(f"{where} is nested deeper than {_MAX_DEPTH} levels")


def _check_form(keyword: str, value: Any, at: str) -> None:
    """Whether the value of a constraining keyword has the form that JSON Schema gives it."""
    if keyword == "type":
        names = value if isinstance(value, list) else [value]
        known = bool(names) and all(isinstance(n, str) and n in _TYPES for n in names)
        _require(known, at, f"must name JSON types, got {value!r}")
    elif keyword == "enum":
        _require(isinstance(value, list) and bool(value), at, "must be a list with a value")
    elif keyword == "required":
        strings = isinstance(value, list) and all(isinstance(name, str) for name in value)
        _require(strings, at, "must be a list of property names")
    elif keyword in _NUMBERS:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        _require(number, at, f"must be a number, got {value!r}")
    elif keyword in _COUNTS:
        count = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        _require(count, at, f"must be a count, got {value!r}")
    elif keyword != "const":  # pattern and format
        _require(isinstance(value, str), at, f"must be a string, got {value!r}")


def _is_open_record(schema: Mapping[str, Any]) -> bool:
    properties = schema.get("properties")
    return (
        properties is not None
        and "additionalProperties" not in schema
        and "patternProperties" not in schema
        and all(name in properties for name in schema.get("required", ()))
    )


def _require(condition: bool, where: str, what: str) -> None:
    if not condition:
        raise GrammarError(f"{where} {what}")
