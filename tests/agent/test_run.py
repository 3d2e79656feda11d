"""Runs: loops over steps, driven by the agent or by the caller."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel

from dspark_agent import (
    Agent,
    FunctionModel,
    FunctionToolset,
    History,
    JsonSchema,
    ModelMessage,
    ModelMessagesTypeAdapter,
    ModelResponse,
    ModelRetry,
    ModelTurn,
    OutputError,
    RunContext,
    StepResult,
    TestModel,
    TextPart,
    ToolCallPart,
    ToolReturnPart,
    UsageLimitExceeded,
    UsageLimits,
    UserError,
    UserPromptPart,
)


class City(BaseModel):
    name: str
    people: int


def population(city: str) -> int:
    """How many people live there."""
    return len(city)


def looping(messages: list[ModelMessage], turn: ModelTurn) -> ToolCallPart | str:
    """Calls the first tool with ever new arguments as long as it may."""
    return ToolCallPart(tool_name=turn.tool_names[0], args={"city": "x" * len(messages)})


def test_a_run_calls_tools_until_it_has_the_output() -> None:
    agent = Agent(TestModel(seed=3), output_type=City, tools=[population])
    result = agent.run_sync("Tell me")
    assert result.output == City(name="d", people=3)
    assert [step.is_final for step in result.steps] == [False, True]
    assert result.usage.requests == 2
    assert result.usage.tool_calls == 1
    kinds = [message.kind for message in result.all_messages()]
    assert kinds == ["request", "response"] * 2


@pytest.mark.anyio
async def test_a_run_takes_another_output_type() -> None:
    agent = Agent(TestModel(), tools=[population])
    assert (await agent.run("Hi", output_type=City)).output == City(name="a", people=0)
    bare = JsonSchema({"type": "object", "properties": {"n": {"const": 7}}, "required": ["n"]})
    assert (await agent.run("Hi", output_type=bare)).output == {"n": 7}


@pytest.mark.anyio
async def test_deps_reach_tools_and_validators_and_both_can_refuse() -> None:
    agent = Agent(TestModel(custom_output_text="Paris"), deps_type=dict[str, int], retries=1)
    seen: list[int] = []

    @agent.tool
    def note(ctx: RunContext[dict[str, int]], word: str) -> str:
        """Note a word."""
        seen.append(ctx.retry)
        if ctx.retry == 0:
            raise ModelRetry("another word")
        assert ctx.messages[-1].parts[0].part_kind == "tool-call"
        return f"{word} {ctx.deps['n']} {ctx.run_step} {ctx.usage.requests}"

    @agent.output_validator
    def check(ctx: RunContext[dict[str, int]], output: str) -> str:
        if ctx.retry == 0:
            raise ModelRetry("once more")
        return f"{output}!"

    async with agent.session(deps={"n": 4}) as session:
        step = await session.step("Go", tool_choice="note")
        assert step.tool_result == "a 4 1 2"
        assert (await session.run("Go on")).output == "Paris!"
    assert seen == [0, 1]


@pytest.mark.anyio
async def test_the_caller_drives_a_run_and_narrows_its_steps() -> None:
    turns: list[ModelTurn] = []

    def answer(messages: list[ModelMessage], turn: ModelTurn) -> str | ToolCallPart:
        turns.append(turn)
        if turn.tool_choice == "population":
            return ToolCallPart(tool_name="population", args={"city": "Rome"})
        return "four"

    agent = Agent(FunctionModel(answer), tools=[population])
    async with agent.iter("How many?") as run:
        with pytest.raises(UserError, match="no result yet"):
            _ = run.result
        first = await run.step(tool_choice="population", settings={"max_tokens": 3})
        assert first.tool_result == 4
        rest: list[StepResult[str]] = [step async for step in run]
        assert [step.output for step in rest] == ["four"]
        with pytest.raises(UserError, match="the run is done"):
            await run.step()
        assert run.result.output == "four"
        assert len(run.result.steps) == 2
    assert [turn.settings.get("max_tokens") for turn in turns] == [3, None]


@pytest.mark.anyio
async def test_a_refused_output_is_a_step_of_its_own_in_a_run() -> None:
    answers = iter(["{", '{"name": "Rome", "people": 3}'])
    agent = Agent(FunctionModel(lambda messages, turn: next(answers)), output_type=City)
    result = await agent.run("Go")
    assert result.output.name == "Rome"
    assert [step.attempts for step in result.steps] == [1, 2]
    assert "not valid JSON" in str(result.steps[0].retry_reason)


@pytest.mark.anyio
async def test_a_run_gives_up_on_its_output_after_the_retries() -> None:
    agent = Agent(
        FunctionModel(lambda messages, turn: "nonsense"), output_type=City, output_retries=3
    )
    with pytest.raises(OutputError) as caught:
        await agent.run("Go")
    assert caught.value.attempts == 4
    assert caught.value.text == "nonsense"


@pytest.mark.parametrize("where", ["agent", "run"])
def test_a_run_has_the_agents_limits_unless_it_has_its_own(where: str) -> None:
    strict, lax = UsageLimits(request_limit=3), UsageLimits(request_limit=1)
    agent = Agent(
        FunctionModel(looping), tools=[population], limits=strict if where == "agent" else lax
    )
    with pytest.raises(UsageLimitExceeded, match="request_limit of 3"):
        agent.run_sync("Go", limits=None if where == "agent" else strict)


def test_every_run_has_a_request_limit() -> None:
    with pytest.raises(UsageLimitExceeded, match="request_limit of 50"):
        Agent(FunctionModel(looping), tools=[population]).run_sync("Go")


def test_an_empty_answer_is_refused() -> None:
    answers = iter(["  ", "hello"])
    agent = Agent(FunctionModel(lambda messages, turn: next(answers)))
    result = agent.run_sync("Hi")
    assert result.output == "hello"
    assert result.steps[0].retry_reason == "The answer was empty."


def test_a_run_goes_on_from_stored_messages() -> None:
    agent = Agent(TestModel(custom_output_text="hi"), instructions="Be brief.")
    first = agent.run_sync("One")
    stored = ModelMessagesTypeAdapter.dump_json(first.all_messages())
    second = agent.run_sync("Two", message_history=ModelMessagesTypeAdapter.validate_json(stored))
    assert second.all_messages()[:2] == first.all_messages()
    asked, said = second.new_messages()
    assert asked.parts == (UserPromptPart(content="Two"),)
    assert said.parts == (TextPart(content="hi"),)
    assert second.usage.requests == 1


def test_a_history_survives_json() -> None:
    result = Agent(TestModel(), tools=[population]).run_sync("Hi")
    text = result.history.model_dump_json()
    assert History.model_validate_json(text).messages == tuple(result.all_messages())


def test_a_history_that_ends_with_open_calls_is_refused_until_they_are_answered() -> None:
    made = ToolCallPart(tool_name="population", args={"city": "Rome"})
    history: list[Any] = [
        *Agent(TestModel(custom_output_text="x")).run_sync("Hi").all_messages()[:1],
        ModelResponse(parts=(made,)),
    ]
    agent = Agent(TestModel(custom_output_text="done"), tools=[population])
    with pytest.raises(UserError, match="tool calls that have no results"):
        agent.run_sync("Go on", message_history=history)
    answer = ToolReturnPart(tool_name="population", content=4, tool_call_id=made.tool_call_id)
    request = type(history[0])(parts=(answer,))
    assert agent.run_sync(message_history=[*history, request]).output == "done"


def test_toolsets_are_shared_between_agents() -> None:
    cities: FunctionToolset[object] = FunctionToolset([population], id="cities")
    for _ in range(2):
        result = Agent(TestModel(), toolsets=[cities]).run_sync("Hi")
        assert result.steps[0].tool_calls[0].tool_name == "population"


@pytest.mark.anyio
async def test_another_model_can_take_a_run() -> None:
    agent = Agent(TestModel(custom_output_text="one"))
    result = await agent.run("Hi", model=TestModel(custom_output_text="two"))
    assert result.output == "two"
    assert result.steps[0].response.parts == (TextPart(content="two"),)
