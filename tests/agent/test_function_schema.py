"""Tools' schemas come from signatures and docstrings, and check what a model sends."""

from __future__ import annotations

import functools
from collections.abc import Callable
from enum import Enum
from typing import Annotated, Any, Literal

import jsonschema
import pytest
from pydantic import BaseModel, Field, ValidationError

from dspark_agent import RunContext, SchemaError
from dspark_agent.function_schema import function_schema, validation_text, without_titles


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Point(BaseModel):
    """A place."""

    x: int
    y: int = 0


def read_file(path: str, first: int = 1, last: int | None = None) -> str:
    """Read a file.

    Line numbers are shown.

    Args:
        path: relative to the workspace
        first: line to begin at
    """
    return f"{path} {first} {last}"


def numpy_style(path: str) -> str:
    """Read.

    Parameters
    ----------
    path : str
        where it is
    """
    return path


def sphinx_style(path: str) -> str:
    """Read.

    :param path: where it is
    """
    return path


def test_the_signature_becomes_an_object_schema_in_its_own_order() -> None:
    schema = function_schema(read_file)
    assert schema.name == "read_file"
    assert schema.description == "Read a file.\n\nLine numbers are shown."
    assert schema.parameters == {
        "type": "object",
        "properties": {
            "path": {"type": "string", "description": "relative to the workspace"},
            "first": {"type": "integer", "default": 1, "description": "line to begin at"},
            "last": {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None},
        },
        "required": ["path"],
        "additionalProperties": False,
    }
    assert list(schema.parameters["properties"]) == ["path", "first", "last"]


@pytest.mark.parametrize("function", [numpy_style, sphinx_style])
def test_docstrings_of_other_styles_describe_parameters_too(function: Callable[..., Any]) -> None:
    properties = function_schema(function).parameters["properties"]
    assert properties["path"]["description"] == "where it is"


def test_a_field_wins_over_the_docstring_and_its_bounds_are_checked() -> None:
    def add(n: Annotated[int, Field(ge=1, description="from the field")]) -> int:
        """Add.

        Args:
            n: from the docstring
        """
        return n

    schema = function_schema(add)
    assert schema.parameters["properties"]["n"] == {
        "type": "integer",
        "minimum": 1,
        "description": "from the field",
    }
    with pytest.raises(ValidationError):
        schema.validate({"n": 0})


def test_rich_types_arrive_as_what_the_function_expects() -> None:
    def paint(colour: Colour, where: list[Point], mode: Literal["fast", "slow"] = "fast") -> None:
        """Paint."""

    schema = function_schema(paint)
    jsonschema.Draft202012Validator.check_schema(schema.parameters)
    arguments = schema.validate('{"colour": "red", "where": [{"x": 1}]}')
    assert arguments == {"colour": Colour.RED, "where": [Point(x=1)]}


def test_names_that_a_model_class_would_shadow_are_fine() -> None:
    def odd(json: str, copy: int, schema: str, model_config: bool) -> None:
        """Odd."""

    arguments = {"json": "a", "copy": 1, "schema": "b", "model_config": True}
    assert function_schema(odd).validate(arguments) == arguments


def test_defaults_are_the_functions_own() -> None:
    def f(path: str, into: list[int] | None = None, /, *, deep: bool = True) -> None:
        """F."""

    schema = function_schema(f)
    arguments = schema.validate({"path": "a", "deep": False})
    assert schema.bind(arguments) == (["a"], {"deep": False})


def test_no_parameters_still_make_an_object() -> None:
    def run_tests() -> str:
        """Run."""
        return ""

    schema = function_schema(run_tests)
    assert schema.parameters["properties"] == {}
    assert schema.validate("") == {}


def test_the_context_is_hidden_from_the_model() -> None:
    def f(ctx: RunContext[int], n: int) -> int:
        """F."""
        return n

    schema = function_schema(f)
    assert schema.takes_ctx
    assert list(schema.parameters["properties"]) == ["n"]


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(ValidationError) as caught:
        function_schema(read_file).validate({"path": "a", "colour": "red"})
    assert "colour" in validation_text(caught.value)


def test_complaints_name_path_reason_and_what_was_given() -> None:
    def f(points: list[Point]) -> None:
        """F."""

    with pytest.raises(ValidationError) as caught:
        function_schema(f).validate({"points": [{"y": "high"}]})
    text = validation_text(caught.value)
    assert "points.0.x: Field required" in text
    assert "points.0.y: Input should be a valid integer" in text
    assert "'high'" in text
    assert "https://" not in text


def _no_annotation(path) -> str:  # type: ignore[no-untyped-def]
    return str(path)


def _varargs(*paths: str) -> str:
    return str(paths)


def _late_context(n: int, ctx: RunContext[None]) -> int:
    return n


def _no_schema(n: Callable[[], int]) -> int:
    return n()


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (_no_annotation, "'path' has no type annotation"),
        (_varargs, r"\*paths"),
        (_late_context, "must be the first parameter"),
        (_no_schema, "_no_schema"),
        (functools.partial(read_file, "a"), "partial"),
    ],
)
def test_signatures_that_cannot_be_described_are_errors_at_declaration(
    function: Callable[..., Any], says: str
) -> None:
    with pytest.raises(SchemaError, match=says):
        function_schema(function)


def test_generated_titles_go_but_properties_called_title_stay() -> None:
    class Book(BaseModel):
        title: str

    assert without_titles(Book.model_json_schema()) == {
        "type": "object",
        "properties": {"title": {"type": "string"}},
        "required": ["title"],
    }
