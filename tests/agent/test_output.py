"""Output types: their schema, their validation, their reading while they are written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
from pydantic import BaseModel, Field

from dspark_agent import JsonSchema, ModelRetry, SchemaError
from dspark_agent.output import Output, Partial


class Plan(BaseModel):
    title: str
    steps: list[str] = Field(max_length=2)


class Tree(BaseModel):
    children: list[Tree] = []


BARE = JsonSchema(
    {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 1}},
        "required": ["n"],
    }
)


def test_text_needs_no_schema() -> None:
    output: Output[str] = Output(str)
    assert output.schema is None
    assert output.allow_text
    assert output.validate("{not json") == "{not json"


def test_a_model_is_asked_for_as_an_object_and_validated_by_pydantic() -> None:
    output: Output[Plan] = Output(Plan)
    assert output.schema is not None
    assert output.schema["type"] == "object"
    assert not output.allow_text
    assert output.validate('{"title": "t", "steps": ["a"]}') == Plan(title="t", steps=["a"])
    with pytest.raises(ModelRetry, match="steps: List should have at most 2 items"):
        output.validate('{"title": "t", "steps": ["a", "b", "c"]}')
    with pytest.raises(ModelRetry, match="not valid JSON"):
        output.validate('{"title": ')


@pytest.mark.parametrize(
    ("output_type", "text", "value"),
    [
        (int, '{"result": 3}', 3),
        (list[int], '{"result": [1, 2]}', [1, 2]),
        (int | None, '{"result": null}', None),
        (tuple[int, str], '{"result": [1, "a"]}', (1, "a")),
        (int | bool, '{"result": true}', True),
    ],
)
def test_what_is_no_object_is_wrapped_into_one(output_type: Any, text: str, value: Any) -> None:
    output: Output[Any] = Output(output_type)
    assert output.schema is not None
    jsonschema.validate(json.loads(text), output.schema)
    assert output.validate(text) == value
    with pytest.raises(ModelRetry):
        output.validate("{}")


def test_a_recursive_type_is_an_object_behind_its_reference() -> None:
    output: Output[Tree] = Output(Tree)
    assert output.schema is not None
    assert "result" not in output.schema.get("properties", {})
    assert output.validate('{"children": [{}]}') == Tree(children=[Tree()])


@pytest.mark.parametrize("text", ["just text", "42", '"quoted"', "[broken"])
def test_typed_or_text_takes_what_is_no_object_as_text(text: str) -> None:
    output: Output[Plan | str] = Output(Plan | str)
    assert output.allow_text
    assert output.validate(text) == text
    assert output.validate('{"title": "t", "steps": []}') == Plan(title="t", steps=[])
    with pytest.raises(ModelRetry, match="steps"):
        output.validate('{"title": "t"}')


def test_a_bare_schema_is_validated_with_jsonschema() -> None:
    output: Output[Any] = Output(BARE)
    assert output.validate('{"n": 1}') == {"n": 1}
    with pytest.raises(ModelRetry, match=r"\$\.n: 0 is less than the minimum of 1"):
        output.validate('{"n": 0}')


@pytest.mark.parametrize("reference", ["https://example.com/s", "#/$defs/missing", "other.json"])
def test_references_that_lead_out_of_a_bare_schema_are_refused(reference: str) -> None:
    with pytest.raises(SchemaError, match=re.escape(reference)):
        JsonSchema({"type": "object", "properties": {"a": {"$ref": reference}}})


def test_references_still_lead_somewhere_once_a_schema_is_wrapped() -> None:
    bare = JsonSchema(
        {
            "type": "array",
            "items": {"$ref": "#/definitions/size"},
            "definitions": {"size": {"enum": ["s", "m"]}},
        }
    )
    output: Output[Any] = Output(bare)
    assert output.schema is not None
    jsonschema.validate({"result": ["s"]}, output.schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"result": ["xl"]}, output.schema)
    assert output.validate('{"result": ["m"]}') == ["m"]


@pytest.mark.parametrize(
    ("declare", "says"),
    [
        (lambda: JsonSchema({"type": "objekt"}), "objekt"),
        (lambda: Output([Plan, str]), "output_type"),
        (lambda: Output(Callable[[], int]), "output_type"),
    ],
)
def test_what_cannot_be_asked_for_is_an_error_at_declaration(declare: Any, says: str) -> None:
    with pytest.raises(SchemaError, match=says):
        declare()


def test_a_partial_result_has_its_json_and_its_value_once_it_validates() -> None:
    output: Output[Plan] = Output(Plan)
    assert output.partial("") is None
    assert output.partial('{"ti') == Partial({}, None)
    assert output.partial('{"title": "Brea') == Partial({"title": "Brea"}, None)
    text = '{"title": "Bread", "steps": ["mix'
    assert output.partial(text) == Partial(
        {"title": "Bread", "steps": ["mix"]}, Plan(title="Bread", steps=["mix"])
    )


def test_a_partial_list_grows_out_of_its_wrapping() -> None:
    output: Output[list[int]] = Output(list[int])
    assert output.partial('{"res') is None
    assert output.partial('{"result": [1, 2') == Partial([1, 2], [1, 2])
