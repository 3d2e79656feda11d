"""Output types: their schema, their validation, their reading while they are written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, NotRequired

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field
from typing_extensions import TypedDict

from dspark_agent import (
    JsonSchema,
    ModelRetry,
    NativeOutput,
    PromptedOutput,
    SchemaError,
    TextOutput,
    ToolOutput,
    UserError,
)
from dspark_agent.output import Output
from dspark_agent.typed_output import Partial


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


class Size(Enum):
    SMALL = "s"
    LARGE = "l"


class Film(TypedDict):
    title: str
    year: NotRequired[int]


@dataclass
class Point:
    x: int
    y: int = 0


@pytest.mark.parametrize(
    ("output_type", "text", "value"),
    [
        (Size, '{"result": "l"}', Size.LARGE),
        (Literal["yes", "no"], '{"result": "no"}', "no"),
        (Film, '{"title": "M"}', {"title": "M"}),
        (Point, '{"x": 3}', Point(3)),
        (Plan | Point, '{"result": {"x": 1, "y": 2}}', Point(1, 2)),
        ([Plan, Point], '{"result": {"x": 1, "y": 2}}', Point(1, 2)),
        (NativeOutput([Plan, Point]), '{"result": {"x": 1}}', Point(1)),
        (NativeOutput(Point), '{"x": 1}', Point(1)),
    ],
    ids=["enum", "literal", "typeddict", "dataclass", "union", "list", "native list", "native"],
)
def test_ordinary_types_are_asked_for_as_json(output_type: Any, text: str, value: Any) -> None:
    output: Output[Any] = Output(output_type)
    assert output.schema is not None
    jsonschema.validate(json.loads(text), output.schema)
    assert output.validate(text) == value
    assert not output.tools


@pytest.mark.parametrize(
    "text",
    [
        '{"x": 1, "y": 2}',
        'Here you are:\n```json\n{"x": 1, "y": 2}\n```\nAnything else?',
        '```\n{"x": 1, "y": 2}\n```',
        '  {"x": 1, "y": 2}\n',
    ],
    ids=["bare", "chatty", "fenced", "spaces"],
)
def test_a_prompted_answer_may_stand_in_a_fence(text: str) -> None:
    output: Output[Point] = Output(PromptedOutput(Point))
    assert output.schema is None
    assert output.allow_text
    assert output.prompt is not None
    assert json.loads(output.prompt.split("\n", 1)[1])["required"] == ["x"]
    assert output.validate(text) == Point(1, 2)


def test_a_prompted_answer_without_json_is_refused() -> None:
    with pytest.raises(ModelRetry, match="not valid JSON"):
        Output(PromptedOutput(Point)).validate("x is one")


def test_a_prompted_answer_is_read_while_its_fence_is_open() -> None:
    output: Output[Film] = Output(PromptedOutput(Film))
    assert output.partial("Sure:\n") is None
    assert output.partial('Sure:\n```json\n{"title": "Met') == Partial(
        {"title": "Met"}, {"title": "Met"}
    )


def book(seat: int, name: str = "nobody") -> str:
    """Book a seat."""
    return f"{name} on {seat}"


def test_output_tools_have_names_descriptions_and_schemas() -> None:
    def names(output_type: Any) -> list[str]:
        return list(Output(output_type).tools)

    assert names(ToolOutput(Plan)) == ["final_result"]
    assert names([ToolOutput(Plan), ToolOutput(Point), book]) == [
        "final_result_Plan", "final_result_Point", "book",
    ]  # fmt: skip
    assert names(ToolOutput(Plan, name="plan") | ToolOutput(list[int])) == ["plan", "final_result"]
    assert names([ToolOutput(Plan), ToolOutput(list[int])])[1] == "final_result_list"
    tool = Output(ToolOutput(book, description="Take it.")).tools["book"].definition
    assert tool.description == "Take it."
    assert tool.parameters["required"] == ["seat"]
    only: Output[Plan] = Output(ToolOutput(Plan))
    assert only.schema is None
    assert not only.allow_text
    assert not only.answers_in_writing


@pytest.mark.parametrize(
    ("declare", "says"),
    [
        (lambda: Output([]), "empty list"),
        (lambda: Output([str, TextOutput(str.split)]), "two options are plain text"),
        (lambda: Output([BARE, Plan]), "cannot be one of several"),
        (lambda: Output(PromptedOutput(Plan) | Point), "stands alone"),
        (lambda: PromptedOutput(Plan, template="JSON please"), "no {schema} in it"),
        (lambda: Output(NativeOutput([Plan, book])), "NativeOutput: book is no type"),
        (lambda: Output(PromptedOutput([Plan, str])), "PromptedOutput: str is no type"),
        (
            lambda: Output(ToolOutput([Plan, Point])),  # type: ignore[call-overload]
            "give it one type or function",
        ),
        (lambda: Output(ToolOutput(TextOutput(len))), "give it one type or function"),
        (lambda: Output(ToolOutput(Plan, name="my plan")), "'my plan' cannot be a tool's name"),
        (lambda: Output(ToolOutput(Plan, name="auto")), "'auto' cannot be a tool's name"),
        (lambda: Output(lambda n: n), "is an identifier"),
        (lambda: Output(ToolOutput(lambda n: n, name="f")), "parameter 'n' has no type"),
        (
            lambda: TextOutput(3),  # type: ignore[call-overload]
            "3 is no function",
        ),
        (lambda: Output(list["Nowhere"]), "Nowhere"),  # type: ignore[name-defined]  # noqa: F821
        (lambda: Output(3), "output_type 3"),
    ],
)
def test_wrong_declarations_name_the_place(declare: Any, says: str) -> None:
    with pytest.raises(SchemaError, match=re.escape(says)):
        declare()


def test_two_output_tools_of_one_name_are_refused() -> None:
    with pytest.raises(UserError, match="two output tools are called 'plan'"):
        Output([ToolOutput(Plan, name="plan"), ToolOutput(Point, name="plan")])


@pytest.mark.parametrize("text", ['{"title": "M", "ye', '{"title": "M", "year": 19'])
def test_a_typeddict_is_typed_while_it_grows(text: str) -> None:
    partial = Output(Film).partial(text)
    assert partial is not None
    assert partial.value["title"] == "M"


@given(st.data())
def test_every_beginning_of_an_answer_reads_as_a_beginning_of_its_value(
    data: st.DataObject,
) -> None:
    """Pydantic's partial mode against the whole: a list only ever grows into the final one."""
    values = data.draw(st.lists(st.text(max_size=5), max_size=4))
    text = json.dumps({"result": values})
    output: Output[list[str]] = Output(list[str])
    cut = data.draw(st.integers(0, len(text)))
    partial = output.partial(text[:cut])
    if partial is None or partial.value is None:
        return
    *whole, last = partial.value or [""]
    assert whole == values[: len(whole)]
    assert not partial.value or values[len(whole)].startswith(last.rstrip("\ufffd"))
    assert output.validate(text) == values
