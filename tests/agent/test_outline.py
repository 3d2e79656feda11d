"""Schemas in a line: what a model is told about a typed result."""

from __future__ import annotations

from typing import Literal

import pytest
from pydantic import BaseModel, Field

from dspark_agent import ModelTurn, ToolDefinition
from dspark_agent.models.outline import ask_for_result, outline


class Part(BaseModel):
    name: str = Field(description="short,\n  unique")
    size: int | None = None


class Order(BaseModel):
    """An order as the shop knows it."""

    kind: Literal["new", "old"]
    parts: list[Part]
    notes: dict[str, str]


class Tree(BaseModel):
    left: Tree | None


def test_an_outline_has_keys_kinds_and_descriptions() -> None:
    assert outline(Order.model_json_schema()) == (
        '{"kind": "new" | "old", "parts": [{"name": string (short, unique), '
        '"size": integer | null}, ...], "notes": object}'
    )


def test_a_result_is_asked_for_once_and_in_the_users_words_where_there_are_any() -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    chat = [{"role": "user", "content": "Count."}]
    told = ask_for_result(chat, ModelTurn(output_schema=schema, allow_text=False))
    assert chat == [{"role": "user", "content": 'Count.\n\nAnswer with JSON: {"n": integer}'}]
    assert ask_for_result(chat, ModelTurn(output_schema=schema), told) == told
    assert len(chat) == 1

    results = [{"role": "tool", "content": "3"}]
    tools = (ToolDefinition("count", "Count.", {}),)
    ask_for_result(results, ModelTurn(output_schema=schema, tools=tools))
    assert results[1:] == [
        {
            "role": "user",
            "content": 'When you are done, answer in words or with JSON: {"n": integer}',
        }
    ]
    assert ask_for_result(results, ModelTurn()) == frozenset()


def test_recursion_ends() -> None:
    text = outline(Tree.model_json_schema())
    assert text.startswith('{"left": {"left": ')
    assert len(text) < 200


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({}, "any"),
        ({"const": 3}, "3"),
        ({"type": ["string", "null"]}, "string | null"),
        ({"$ref": "#/nowhere"}, "any"),
    ],
)
def test_the_corners(schema: dict[str, object], text: str) -> None:
    assert outline(schema) == text
