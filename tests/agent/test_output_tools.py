"""Answers given as calls, as text for a function, or as JSON that was only asked for."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
from pydantic import BaseModel

from dspark_agent import (
    Agent,
    FunctionModel,
    ModelMessage,
    ModelRetry,
    ModelTurn,
    NativeOutput,
    OutputError,
    PartialOutput,
    PromptedOutput,
    RetryPromptPart,
    RunContext,
    StepEnd,
    StepKind,
    TestModel,
    TextOutput,
    TextPart,
    ToolCallPart,
    ToolFailed,
    ToolOutput,
    ToolResult,
    ToolReturnPart,
    UserError,
    UserPromptPart,
)

pytestmark = pytest.mark.anyio


class Plan(BaseModel):
    title: str
    steps: list[str] = []


class Refusal(BaseModel):
    why: str


def look(at: str) -> str:
    """Look at it."""
    return f"saw {at}"


def call(name: str, **args: Any) -> ToolCallPart:
    return ToolCallPart(tool_name=name, args=args)


def says(*answers: Any) -> tuple[FunctionModel, list[ModelTurn], list[list[ModelMessage]]]:
    """A model that gives the answers in order; the turns and messages it was asked with."""
    left = iter(answers)
    turns: list[ModelTurn] = []
    heard: list[list[ModelMessage]] = []

    def answer(messages: list[ModelMessage], turn: ModelTurn) -> Any:
        turns.append(turn)
        heard.append(messages)
        return next(left)

    return FunctionModel(answer), turns, heard


async def test_the_answer_is_the_call_of_an_output_tool() -> None:
    model, turns, _ = says(call("look", at="x"), call("final_result", title="t"))
    agent = Agent(model, output_type=ToolOutput(Plan), tools=[look])
    result = await agent.run("Go")
    assert result.output == Plan(title="t")
    assert [turn.tool_names for turn in turns] == [("look", "final_result")] * 2
    assert turns[0].output_tools == ("final_result",)
    assert turns[0].tool_choice == "required"
    assert not turns[0].allow_text
    assert turns[0].output_schema is None
    assert result.usage.tool_calls == 1
    accepted = result.steps[-1].tool_results[0]
    assert isinstance(accepted, ToolReturnPart)
    assert accepted.content == "The answer was accepted."


async def test_a_history_that_ends_with_an_answer_can_be_gone_on_from() -> None:
    model, _, heard = says(call("final_result", title="a"), call("final_result", title="b"))
    agent = Agent(model, output_type=ToolOutput(Plan))
    first = await agent.run("One")
    second = await agent.run("Two", message_history=first.history)
    assert second.output == Plan(title="b")
    assert [part.part_kind for message in heard[1] for part in message.parts] == [
        "user-prompt", "tool-call", "tool-return", "user-prompt",
    ]  # fmt: skip


async def test_tools_called_beside_the_answer_are_run_and_the_first_answer_counts() -> None:
    calls = [
        call("final_result", title="first"),
        call("look", at="x"),
        call("final_result", title="second"),
    ]
    model, _, _ = says(calls)
    seen: list[Any] = []
    agent = Agent(model, output_type=ToolOutput(Plan), tools=[look])
    result = await agent.run("Go", on_event=seen.append)
    assert result.output == Plan(title="first")
    contents = [part.content for part in result.steps[0].tool_results]
    assert contents == [
        "The answer was accepted.",
        "saw x",
        "Not used: another call of this turn gave the answer.",
    ]
    assert sorted(e.index for e in seen if isinstance(e, ToolResult)) == [0, 1, 2]


async def test_a_refused_answer_goes_back_as_the_result_of_its_call() -> None:
    model, _, heard = says(call("final_result"), call("final_result", title="t"))
    agent = Agent(model, output_type=ToolOutput(Plan))
    result = await agent.run("Go")
    assert result.output == Plan(title="t")
    complaint = heard[1][-1].parts[0]
    assert isinstance(complaint, RetryPromptPart)
    assert complaint.tool_name == "final_result"
    assert complaint.content == "title: Field required"
    assert [step.retry_reason for step in result.steps] == ["title: Field required", None]


@pytest.mark.parametrize("in_session", [True, False])
async def test_answers_are_refused_as_often_as_output_retries_say(in_session: bool) -> None:
    bad = [call("look", at="x"), call("final_result")]
    model, _, _ = says(*[bad] * 3)
    agent = Agent(model, output_type=ToolOutput(Plan), tools=[look], output_retries=2)
    async with agent.session() as session:
        work = session.step if in_session else agent.run
        with pytest.raises(OutputError, match="Field required") as caught:
            await work("Go")
    assert caught.value.attempts == 3
    assert caught.value.text == "{}"


async def test_a_function_is_an_output() -> None:
    threads: list[int] = []

    def book(ctx: RunContext[str], seat: int, name: str = "nobody") -> list[str]:
        """Book a seat."""
        threads.append(threading.get_ident())
        if seat > 9:
            raise ModelRetry(f"no seat {seat} (try {ctx.retry})")
        if seat == 0:
            raise ToolFailed("seat 0 is broken")
        return [ctx.deps, name, str(seat)]

    model, turns, heard = says(call("book", seat=10), call("book", seat=0), call("book", seat=3))
    agent = Agent(model, output_type=book, deps_type=str, output_retries=2)
    assert (await agent.run("Go", deps="hall")).output == ["hall", "nobody", "3"]
    assert turns[0].tool_names == ("book",)
    assert turns[0].tools[0].description == "Book a seat."
    told = [message[-1].parts[0].content for message in heard[1:]]  # type: ignore[union-attr]
    assert told == ["no seat 10 (try 0)", "seat 0 is broken"]
    assert threading.get_ident() not in threads


async def test_wrong_arguments_of_an_output_function_are_refused() -> None:
    async def add(a: int, b: int) -> int:
        return a + b

    model, _, heard = says(call("add", a=1), call("add", a=1, b=2))
    assert (await Agent(model, output_type=add).run("Go")).output == 3
    assert "b: Field required" in heard[1][-1].parts[0].content  # type: ignore[union-attr]


async def test_a_choice_of_everything_in_one_turn() -> None:
    output = ToolOutput(Refusal, name="refuse") | Plan | TextOutput(str.split)
    for answer, value in [
        (call("refuse", why="no"), Refusal(why="no")),
        ('{"title": "t"}', Plan(title="t")),
        ("two words", ["two", "words"]),
    ]:
        model, turns, _ = says(answer)
        result = await Agent(model, output_type=output, tools=[look]).run("Go")
        assert result.output == value
        (turn,) = turns
        assert turn.tool_choice == "auto"
        assert turn.tool_names == ("look", "refuse")
        assert turn.output_schema is not None
        assert turn.allow_text
        assert result.steps[0].kind is StepKind.MIXED


async def test_text_beside_the_only_way_to_answer_is_pointed_at_it() -> None:
    model, _, heard = says("It is done.", call("final_result", title="t"))
    assert (await Agent(model, output_type=ToolOutput(Plan)).run("Go")).output == Plan(title="t")
    assert "calling final_result" in heard[1][-1].parts[0].content  # type: ignore[union-attr]


async def test_a_text_goes_through_its_function_with_the_context() -> None:
    async def shout(ctx: RunContext[int], text: str) -> str:
        if len(text) < ctx.deps:
            raise ModelRetry("longer")
        return text.upper()

    model, turns, _ = says("hi", "hello")
    agent = Agent(model, output_type=TextOutput(shout), deps_type=int)
    assert (await agent.run("Go", deps=3)).output == "HELLO"
    assert turns[0].output_schema is None
    assert turns[0].tool_choice == "none"


async def test_a_prompted_output_says_its_schema_once_and_asks_again() -> None:
    model, turns, heard = says("Sure!", 'Here:\n```json\n{"title": "t"}\n```', '{"title": "u"}')
    agent = Agent(model, output_type=PromptedOutput(Plan, template="As JSON: {schema}"))
    async with agent.session() as session:
        assert (await session.step("One")).output == Plan(title="t")
        assert (await session.step("Two")).output == Plan(title="u")
    said = [
        part.content
        for message in heard[-1]
        for part in message.parts
        if isinstance(part, UserPromptPart)
    ]
    assert said[0] == "One"
    assert json.loads(said[1].removeprefix("As JSON: "))["required"] == ["title"]
    assert said[2:] == ["Two"]
    assert all(turn.output_schema is None and turn.allow_text for turn in turns)


async def test_validators_see_every_kind_of_answer() -> None:
    model, _, _ = says(call("final_result", title="t"))
    agent = Agent(model, output_type=ToolOutput(Plan))

    @agent.output_validator
    def louder(plan: Plan) -> Plan:
        return Plan(title=plan.title.upper())

    assert (await agent.run("Go")).output == Plan(title="T")


@pytest.mark.parametrize(
    ("output_type", "value"),
    [
        (ToolOutput(Plan), Plan(title="a")),
        (ToolOutput(Plan) | ToolOutput(Refusal), Plan(title="a")),
        (NativeOutput(Plan), Plan(title="a")),
        (PromptedOutput(Plan), None),
    ],
)
async def test_the_test_model_calls_its_tools_and_then_answers(
    output_type: Any, value: Any
) -> None:
    agent: Agent[object, Any] = Agent(TestModel(), output_type=output_type, tools=[look])
    if value is None:
        model = TestModel(custom_output_text='{"title": "a"}')
        result = await agent.run("Go", model=model)
        value = Plan(title="a")
    else:
        result = await agent.run("Go")
    assert result.output == value
    assert [call.tool_name for call in result.steps[0].tool_calls] == ["look"]


async def test_a_runs_own_output_tool_is_known_from_its_beginning() -> None:
    model, turns, _ = says(call("final_result", why="no"))
    result = await Agent(model).run("Go", output_type=ToolOutput(Refusal))
    assert result.output == Refusal(why="no")
    assert turns[0].tool_names == ("final_result",)


async def test_a_session_refuses_an_output_tool_it_was_not_opened_with() -> None:
    async with Agent(TestModel(), output_type=ToolOutput(Plan)).session() as session:
        assert (await session.step("Go")).output == Plan(title="a")
        with pytest.raises(UserError, match="'final_result' is unknown to this session"):
            await session.step("Go", output_type=ToolOutput(Refusal))
        assert (await session.step("Go", output_type=Refusal)).output == Refusal(why="a")


async def test_a_step_that_must_call_a_tool_offers_no_output_tool() -> None:
    model, turns, _ = says(call("look", at="x"), call("final_result", title="t"))
    async with Agent(model, output_type=ToolOutput(Plan), tools=[look]).session() as session:
        await session.step("Go", tool_choice="required")
        await session.step("Now answer", tools=[])
    assert turns[0].tool_names == ("look",)
    assert turns[1].tool_names == ("final_result",)


def final_result(text: str) -> str:
    """A tool with an unlucky name."""
    return text


async def test_a_tool_with_the_name_of_the_output_is_refused() -> None:
    message = "agent 'planner': its output_type and one of its tools are both called 'final_result'"
    with pytest.raises(UserError, match=message):
        Agent(TestModel(), output_type=ToolOutput(Plan), tools=[final_result], name="planner")
    late = Agent(TestModel(), output_type=ToolOutput(Plan), name="planner")
    late.tool_plain(final_result)
    with pytest.raises(UserError, match=message):
        await late.run("Go")


async def test_the_answer_is_seen_growing_inside_its_call() -> None:
    model, _, _ = says(
        [TextPart(content="Well:"), call("final_result", title="a b", steps=["c d"])]
    )
    agent = Agent(model, output_type=ToolOutput(Plan), tools=[look])
    seen: list[Any] = []
    result = await agent.run("Go", on_event=seen.append)
    partials = [event.value for event in seen if isinstance(event, PartialOutput)]
    assert partials[-1] == result.output == Plan(title="a b", steps=["c d"])
    assert len(partials) > 2
    assert isinstance(seen[-1], StepEnd)


async def test_arguments_of_other_tools_are_no_partial_answer() -> None:
    model, _, _ = says(call("look", at="title"), call("final_result", title="t"))
    seen: list[Any] = []
    agent = Agent(model, output_type=ToolOutput(Plan), tools=[look])
    await agent.run("Go", on_event=seen.append)
    assert {event.step for event in seen if isinstance(event, PartialOutput)} == {1}
