"""What of JSON Schema is honoured, and that everything else is refused where it is declared."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from typing import Any, Literal

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from dspark_backend.errors import GrammarError
from dspark_backend.grammar.dialect import Dialect
from dspark_backend.grammar.schema import first_characters, normalise

Walk = Callable[..., list[int] | None]
DialectNamed = Callable[[str], Dialect]


def record(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


TREE = {
    "$defs": {
        "Node": record(value={"type": "integer", "minimum": 0, "maximum": 9})
        | {
            "properties": {
                "value": {"type": "integer", "minimum": 0, "maximum": 9},
                "next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]},
            }
        }
    },
    "$ref": "#/$defs/Node",
}
HONOURED: dict[str, dict[str, Any]] = {
    "strings": record(a={"type": "string", "maxLength": 6}, b={"type": "string", "minLength": 1}),
    "pattern": {"type": "string", "pattern": "^[a-c]{2,4}x?$"},
    "format": {"type": "string", "format": "date"},
    "numbers": record(
        i={"type": "integer", "minimum": -3, "exclusiveMaximum": 20},
        n={"type": "number", "minimum": 0, "maximum": 2.5},
        m={"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 1000},
    ),
    "constants": record(k={"const": {"x": [1, "é"], "y": None}}, e={"enum": [1, "two", True]}),
    "array": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    "tuple": {"type": "array", "prefixItems": [{"type": "null"}, {"enum": ["z"]}], "items": False}
    | {"minItems": 2},
    "optional": {
        "type": "object",
        "properties": {"a": {"type": "null"}, "b": {"type": "null"}, "c": {"type": "null"}},
        "required": ["b"],
    },
    "map": {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 2},
    "patterns": {"type": "object", "patternProperties": {"^[ab]$": {"type": "null"}}}
    | {"additionalProperties": False},
    "any of": {"anyOf": [{"type": "null"}, record(a={"type": "boolean"})]},
    "one of": {"oneOf": [record(t={"const": "a"}), record(t={"const": "b"})]},
    "all of": {"allOf": [record(a={"type": "null"}), record(b={"type": "null"})]},
    "types": {"type": ["null", "boolean"]},
    "recursion": TREE,
    "nothing said": {},
}


def layout(text: str) -> str:
    """``text`` with the whitespace between its JSON tokens as it must be."""
    tokens = re.findall(r'"(?:[^"\\]|\\.)*"|[-+0-9.eE]+|true|false|null|[{}\[\]:,]', text)
    spaced = {",": ", ", ":": ": "}
    return "".join(spaced.get(token, token) for token in tokens)


def assert_declared_order(value: Any, schema: Any) -> None:
    """Declared properties come first and in the schema's order."""
    if isinstance(value, dict) and "properties" in schema:
        declared = [name for name in schema["properties"] if name in value]
        assert list(value)[: len(declared)] == declared


@pytest.mark.parametrize("schema", HONOURED.values(), ids=list(HONOURED))
def test_every_random_walk_gives_a_valid_value_in_the_fixed_layout(
    dialect: Dialect, walk: Walk, schema: dict[str, Any]
) -> None:
    grammar = dialect.compiler.compile_json_schema(schema)
    validator = jsonschema.Draft202012Validator(
        schema, format_checker=jsonschema.FormatChecker(formats=["date"])
    )
    rng = np.random.default_rng(0)
    finished = 0
    for attempt in range(16):
        tokens = walk(grammar, dialect.tokenizer, rng, canonical=attempt % 2 == 0)
        if tokens is None:
            continue
        text = dialect.tokenizer.decode(tokens)
        value = json.loads(text)
        validator.validate(value)
        assert text == layout(text)
        assert_declared_order(value, schema)
        finished += 1
    assert finished >= 4


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "not": (record(a={"not": {"type": "null"}}), r"^\$\.properties\.a\.not: the keyword 'not'"),
    "if": ({"if": {}, "then": {}}, r"^\$\.if: "),
    "uniqueItems": ({"type": "array", "uniqueItems": True}, r"^\$\.uniqueItems: "),
    "contains": ({"type": "array", "contains": {}}, r"^\$\.contains: "),
    "propertyNames": ({"type": "object", "propertyNames": {}}, r"^\$\.propertyNames: "),
    "a misspelt keyword": (
        record(a={"type": "integer", "minimun": 3}),
        r"^\$\.properties\.a\.minimun: the keyword 'minimun'",
    ),
    "another draft's keyword": ({"type": "string", "nullable": True}, r"^\$\.nullable: "),
    "items as a list": ({"type": "array", "items": [{}]}, r"^\$\.items must be a schema"),
    "an unknown type": ({"type": "strnig"}, r"^\$\.type must name JSON types, got 'strnig'"),
    "an exclusive flag": ({"type": "number", "exclusiveMinimum": True}, r"^\$\.exclusiveMinimum"),
    "a negative count": ({"type": "string", "minLength": -1}, r"^\$\.minLength must be a count"),
    "a broken list": ({"anyOf": []}, r"^\$\.anyOf must be a list of schemas"),
    "an empty enum": ({"enum": []}, r"^\$\.enum must be a list"),
    "names that are none": ({"required": [1]}, r"^\$\.required must be a list of property names"),
    "a remote reference": ({"$ref": "other.json#/a"}, r"^\$\.\$ref must start with '#'"),
    "a dangling reference": ({"$ref": "#/$defs/Gone"}, r"^\$\.\$ref leads nowhere"),
    "an inner base": (record(a={"$id": "x"}), r"^\$\.properties\.a\.\$id: "),
    "repeatable names": (
        {"type": "object", "additionalProperties": {}, "minProperties": 3},
        r"^\$\.minProperties cannot be enforced",
    ),
    "look-around": (
        record(a={"type": "array", "items": {"type": "string", "pattern": "(?=a)b"}}),
        r"^\$\.properties\.a\.items\.pattern: .*look-around",
    ),
    "an unknown format": (
        record(a=record(b={"type": "string", "format": "isbn"})),
        r"^\$\.properties\.a\.properties\.b\.format: Unknown format: isbn",
    ),
    "overlapping oneOf": (
        {"anyOf": [{"type": "null"}, {"oneOf": [{"type": "integer"}, {"type": "number"}]}]},
        r"^\$\.anyOf\[1\]\.oneOf: oneOf cannot be enforced .* use anyOf",
    ),
    "contradictory bounds": (
        record(a={"type": "string", "minLength": 3, "maxLength": 2}),
        r"^\$\.properties\.a\.m..Length: Unsatisfiable",
    ),
}


@pytest.mark.parametrize(("schema", "message"), REFUSED.values(), ids=list(REFUSED))
def test_what_cannot_be_honoured_is_refused_by_keyword_and_path(
    dialect_named: DialectNamed, schema: dict[str, Any], message: str
) -> None:
    with pytest.raises(GrammarError, match=re.compile(message, re.DOTALL)):
        dialect_named("tiny-generic").compiler.compile_json_schema(schema)


def test_nesting_without_end_is_refused() -> None:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(500):
        schema = {"type": "array", "items": schema}
    with pytest.raises(GrammarError, match="nested deeper than 128"):
        normalise(schema)


def test_annotations_go_and_properties_of_the_same_name_stay() -> None:
    schema = record(title={"type": "string", "title": "T", "default": "x"}, description={}) | {
        "title": "Book",
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "book",
        "x-origin": "here",
    }
    normal = normalise(schema)
    assert normal["properties"] == {"title": {"type": "string"}, "description": {}}
    assert set(normal) == {"type", "properties", "required", "additionalProperties"}


def test_declared_objects_are_closed_only_where_that_cannot_contradict() -> None:
    closed = record(a={})
    assert normalise(closed)["additionalProperties"] is False
    assert "additionalProperties" not in normalise({"type": "object"})
    assert normalise({**closed, "additionalProperties": {}})["additionalProperties"] == {}
    assert "additionalProperties" not in normalise({**closed, "required": ["a", "b"]})
    both = normalise({"allOf": [closed, record(b={})]})
    assert all("additionalProperties" not in part for part in both["allOf"])
    beside = normalise({**closed, "anyOf": [record(b={}), record(c={})]})
    assert "additionalProperties" not in beside


def test_references_move_with_the_schema() -> None:
    moved = normalise(TREE, pointer="/properties/arguments")
    assert moved["$ref"] == "#/properties/arguments/$defs/Node"
    inner = moved["$defs"]["Node"]["properties"]["next"]["anyOf"][0]
    assert inner == {"$ref": "#/properties/arguments/$defs/Node"}


class _Cat(BaseModel):
    kind: Literal["cat"]
    lives: int = Field(9, ge=1, le=9, description="left")


class _Dog(BaseModel):
    kind: Literal["dog"]
    tricks: list[str] = []


class _Owner(BaseModel):
    """Somebody."""

    name: str = Field(max_length=8)
    age: int | None = None
    pet: _Cat | _Dog = Field(discriminator="kind")
    scores: dict[str, float] = {}
    home: tuple[Literal["n", "s"], bool]


def test_schemas_as_pydantic_writes_them_give_values_that_pydantic_reads(
    dialect_named: DialectNamed, walk: Walk
) -> None:
    dialect = dialect_named("tiny-generic")
    grammar = dialect.compiler.compile_json_schema(_Owner.model_json_schema())
    rng = np.random.default_rng(3)
    walks = (walk(grammar, dialect.tokenizer, rng) for _ in range(30))
    texts = [dialect.tokenizer.decode(tokens) for tokens in walks if tokens is not None]
    pets = {_Owner.model_validate_json(text).pet.kind for text in texts}
    assert pets == {"cat", "dog"}


def _schemas() -> st.SearchStrategy[dict[str, Any]]:
    names = st.sampled_from(["a", "b", "c", "name", "arguments", "x y"])
    leaves = st.one_of(
        st.sampled_from([{"type": "null"}, {"type": "boolean"}, {"type": "integer"}]),
        st.builds(
            lambda low, more: {"type": "integer", "minimum": low, "maximum": low + more},
            st.integers(-50, 50),
            st.integers(0, 500),
        ),
        st.builds(
            lambda low, more: {"type": "string", "minLength": low, "maxLength": low + more},
            st.integers(0, 3),
            st.integers(0, 5),
        ),
        st.lists(
            st.none() | st.booleans() | st.integers(-9, 99) | st.text(max_size=4),
            min_size=1,
            max_size=3,
        ).map(lambda values: {"enum": values}),
    )

    def grow(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
        records = st.dictionaries(names, inner, max_size=3).flatmap(
            lambda properties: st.lists(st.sampled_from([*properties, ""]), unique=True).map(
                lambda wanted: {
                    "type": "object",
                    "properties": properties,
                    "required": [name for name in properties if name in wanted],
                }
            )
        )
        arrays = inner.map(lambda items: {"type": "array", "items": items, "maxItems": 2})
        unions = st.lists(inner, min_size=1, max_size=3).map(lambda parts: {"anyOf": parts})
        return records | arrays | unions

    return st.recursive(leaves, grow, max_leaves=6)


@given(schema=_schemas(), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_random_schemas_give_valid_values_that_begin_as_announced(
    schema: dict[str, Any], seed: int, dialect_named: DialectNamed, walk: Walk
) -> None:
    dialect = dialect_named("tiny-hermes")
    grammar = dialect.compiler.compile_json_schema(schema)
    rng = np.random.default_rng(seed)
    for _ in range(3):
        tokens = walk(grammar, dialect.tokenizer, rng)
        if tokens is None:
            continue
        text = dialect.tokenizer.decode(tokens)
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))
        assert text == layout(text)
        assert text[0] in first_characters(normalise(schema))


def _documents() -> st.SearchStrategy[Any]:
    """JSON that looks like a schema to various degrees."""
    keywords = st.one_of(
        st.sampled_from(["type", "const", "enum", "pattern", "format", "minLength", "maximum"]),
        st.sampled_from(["items", "prefixItems", "anyOf", "oneOf", "allOf", "$ref", "$defs", "a"]),
        st.sampled_from(["properties", "required", "additionalProperties", "minProperties"]),
    )
    scalars = st.none() | st.booleans() | st.integers(-2, 3) | st.floats(allow_nan=False)
    words = st.sampled_from(["object", "string", "#", "#/$defs/a", "#/items/0", "a", "[", "date"])
    return st.recursive(
        scalars | words,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keywords, inner, max_size=4),
        max_leaves=12,
    )


@given(document=_documents())
@settings(max_examples=300, deadline=None)
def test_any_document_compiles_or_is_refused_as_a_grammar_error(
    document: Any, dialect_named: DialectNamed
) -> None:
    with contextlib.suppress(GrammarError):
        dialect_named("tiny-generic").compiler.compile_json_schema(document)
