"""The test doubles that users get: what they answer, and that it fits what was asked."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, TypeAdapter

from dspark_agent import (
    Agent,
    FunctionModel,
    ModelError,
    ModelResponse,
    SchemaError,
    TestModel,
    TextPart,
    infer_model,
)
from dspark_agent.models.sample import sample


class Leaf(BaseModel):
    kind: Literal["leaf"]
    size: Annotated[int, Field(ge=3, le=9, multiple_of=3)]


class Branch(BaseModel):
    kind: Literal["branch"]
    children: list[Leaf | Branch] = Field(min_length=2)


TYPES: list[Any] = [
    int,
    Annotated[float, Field(gt=1, lt=2)],
    Annotated[str, Field(min_length=4, max_length=6)],
    bool,
    None,
    Literal["x", "y"],
    list[Annotated[int, Field(lt=0)]],
    tuple[int, str],
    dict[str, int],
    Leaf,
    Branch,
    Leaf | Branch | None,
]


@given(st.sampled_from(TYPES), st.integers(0, 50))
def test_made_up_values_fit_their_type(kind: Any, seed: int) -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(kind)
    schema = adapter.json_schema()
    value = sample(schema, seed=seed)
    jsonschema.validate(value, schema)
    adapter.validate_python(value)


def test_a_reference_to_nowhere_is_an_error() -> None:
    with pytest.raises(SchemaError, match="leads nowhere"):
        sample({"$ref": "#/$defs/missing"})


def test_the_test_model_calls_each_tool_once_then_answers() -> None:
    def first(n: int) -> int:
        """First."""
        return n

    def second() -> str:
        """Second."""
        return "b"

    agent = Agent(TestModel(seed=2), tools=[first, second])
    result = agent.run_sync("Go")
    assert [call.tool_name for call in result.steps[0].tool_calls] == ["first", "second"]
    assert result.output == '{"first": "2", "second": "b"}'
    chosen = Agent(TestModel(call_tools=["second"]), tools=[first, second]).run_sync("Go")
    assert [call.tool_name for call in chosen.steps[0].tool_calls] == ["second"]
    one = Agent(TestModel(), tools=[first, second], model_settings={"parallel_tool_calls": False})
    assert [len(step.tool_calls) for step in one.run_sync("Go").steps] == [1, 1, 0]


def test_custom_answers() -> None:
    assert Agent(TestModel(custom_output_text="hi")).run_sync("Go").output == "hi"
    leaf = {"kind": "leaf", "size": 6}
    agent = Agent(TestModel(custom_output_args=leaf), output_type=Leaf)
    assert agent.run_sync("Go").output == Leaf(kind="leaf", size=6)


@pytest.mark.parametrize(
    "answer",
    ["hello", [TextPart(content="hello")], ModelResponse(parts=(TextPart(content="hello"),))],
)
def test_a_function_answers_in_any_form(answer: Any) -> None:
    async def asynchronous(messages: Any, turn: Any) -> Any:
        return answer

    assert Agent(FunctionModel(asynchronous)).run_sync("Go").output == "hello"
    assert Agent(FunctionModel(lambda messages, turn: answer)).run_sync("Go").output == "hello"


def test_what_is_no_answer_is_an_error() -> None:
    with pytest.raises(ModelError, match="returned 3"):
        Agent(FunctionModel(lambda messages, turn: 3)).run_sync("Go")  # type: ignore[arg-type, return-value]


def test_a_model_is_taken_as_it_is() -> None:
    model = TestModel()
    assert infer_model(model) is model
