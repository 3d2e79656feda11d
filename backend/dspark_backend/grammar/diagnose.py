"""Which part of a schema a grammar compiler refused: found by trying the parts one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dspark_backend.errors import GrammarError
from dspark_backend.grammar.schema import SCHEMA_LISTS, SCHEMA_MAPS, SCHEMAS, normalise

_DEFINITIONS = ("$defs", "definitions")


def locate_failure(
    schema: Mapping[str, Any], where: str, fails: Callable[[dict[str, Any]], str | None]
) -> str | None:
    """Path of the smallest failing part of ``schema`` (which is called ``where``), and why.

    ``fails`` takes a normalised schema and says what is wrong with it, or None. Parts are tried
    with the definitions of the whole schema beside them. None if the whole does not fail.
    """
    definitions = {key: schema[key] for key in _DEFINITIONS if key in schema}

    def complaint(part: Mapping[str, Any]) -> str | None:
        try:
            return fails(normalise({**definitions, **part}, whole=False))
        except GrammarError as error:  # taking a keyword away can leave a part that says nothing
            return str(error)

    message = complaint(schema)
    if message is None:
        return None
    part = schema
    descending = True
    while descending:
        descending = False
        for name, child in _children(part):
            inner = complaint(child)
            if inner is not None:
                part, where, message, descending = child, f"{where}.{name}", inner, True
                break
    for keyword in sorted(part, key="type".__eq__):  # last: without a type nothing else bites
        if complaint({key: value for key, value in part.items() if key != keyword}) is None:
            return f"{where}.{keyword}: {message}"
    return f"{where}: {message}"


def _children(schema: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The schemas directly inside ``schema``, with the path of each from there."""
    for keyword in SCHEMA_MAPS:
        for name, part in schema.get(keyword, {}).items():
            if isinstance(part, Mapping):
                yield f"{keyword}.{name}", part
    for keyword in SCHEMA_LISTS:
        for place, part in enumerate(schema.get(keyword, [])):
            if isinstance(part, Mapping):
                yield f"{keyword}[{place}]", part
    for keyword in SCHEMAS:
        if isinstance(schema.get(keyword), Mapping):
            yield keyword, schema[keyword]
