"""Hooks around model turns and tool calls, and guards that stop a run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dspark_agent import (
    Agent,
    FunctionModel,
    GuardrailTripped,
    Hooks,
    ModelMessage,
    ModelResponse,
    ModelRetry,
    ModelSettings,
    ModelTurn,
    RetryPromptPart,
    RunContext,
    TestModel,
    ToolCallPart,
    ToolFailed,
    ToolOutput,
    ToolRetriesExceeded,
    ToolReturnPart,
    UserError,
)

pytestmark = pytest.mark.anyio

Result = ToolReturnPart | RetryPromptPart


def double(n: int) -> int:
    """Twice n."""
    return 2 * n


def ask_double(messages: list[ModelMessage], turn: ModelTurn) -> ToolCallPart | str:
    last = messages[-1].parts[-1]
    if last.part_kind == "user-prompt" and "double" in turn.tool_names:
        return ToolCallPart(tool_name="double", args={"n": 4})
    return str(getattr(last, "content", ""))


class Diary(Hooks[Any]):
    """Writes down what it sees."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name = name
        self.log = log

    async def before_model(self, ctx: RunContext[Any], turn: ModelTurn) -> ModelTurn | None:
        self.log.append(f"{self.name} before model {ctx.run_step}: {len(ctx.messages)} messages")
        return None

    async def after_model(self, ctx: RunContext[Any], response: ModelResponse) -> None:
        self.log.append(f"{self.name} after model: {len(response.tool_calls)} calls")

    async def before_tool(self, ctx: RunContext[Any], call: ToolCallPart) -> ToolCallPart | None:
        self.log.append(f"{self.name} before {ctx.tool_name}{call.args}")
        return None

    async def after_tool(
        self, ctx: RunContext[Any], call: ToolCallPart, result: Result
    ) -> Result | None:
        self.log.append(f"{self.name} after {call.tool_name}: {result.content}")
        return None


async def test_hooks_run_around_every_turn_and_call_the_first_outermost() -> None:
    log: list[str] = []
    hooks = [Diary("a", log), Diary("b", log)]
    agent = Agent(FunctionModel(ask_double), tools=[double], hooks=hooks)
    assert (await agent.run("Go")).output == "8"
    assert log == [
        "a before model 0: 1 messages",
        "b before model 0: 1 messages",
        "b after model: 1 calls",
        "a after model: 1 calls",
        "a before double{'n': 4}",
        "b before double{'n': 4}",
        "b after double: 8",
        "a after double: 8",
        "a before model 1: 3 messages",
        "b before model 1: 3 messages",
        "b after model: 0 calls",
        "a after model: 0 calls",
    ]


async def test_a_hook_narrows_the_turn() -> None:
    turns: list[ModelTurn] = []

    def answer(messages: list[ModelMessage], turn: ModelTurn) -> str:
        turns.append(turn)
        return "done"

    class Frugal(Hooks):
        async def before_model(self, ctx: RunContext, turn: ModelTurn) -> ModelTurn | None:
            return replace(turn, tools=(), tool_choice="none", settings=ModelSettings(seed=7))

    await Agent(FunctionModel(answer), tools=[double], hooks=[Frugal()]).run("Go")
    assert turns[0].tools == ()
    assert turns[0].settings == {"seed": 7}


async def test_hooks_change_the_arguments_and_the_result_but_not_what_the_model_wrote() -> None:
    class Clamp(Hooks):
        async def before_tool(self, ctx: RunContext, call: ToolCallPart) -> ToolCallPart | None:
            return call.model_copy(update={"args": {"n": 1}})

        async def after_tool(
            self, ctx: RunContext, call: ToolCallPart, result: Result
        ) -> Result | None:
            assert call.args == {"n": 1}
            return result.model_copy(update={"content": f"<{result.content}>"})

    result = await Agent(FunctionModel(ask_double), tools=[double], hooks=[Clamp()]).run("Go")
    assert result.output == "<2>"
    assert result.steps[0].tool_calls[0].args == {"n": 4}


@pytest.mark.parametrize("place", ["before_tool", "after_tool"])
@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (ModelRetry("not four"), RetryPromptPart, "not four"),
        (ToolFailed("broken"), ToolReturnPart, "broken"),
    ],
)
async def test_what_a_hook_says_to_the_model_takes_the_calls_place(
    place: str, error: Exception, kind: type, text: str
) -> None:
    ran: list[int] = []

    def note(n: int) -> int:
        """Note n."""
        ran.append(n)
        return n

    async def refuse(*args: Any) -> None:
        raise error

    hooks = Hooks[Any]()
    setattr(hooks, place, refuse)
    async with Agent(TestModel(), tools=[note], hooks=[hooks]).session() as session:
        run = session.step("Go", tool_choice="note")
        if kind is RetryPromptPart:  # for ever: past the tool's retries
            with pytest.raises(ToolRetriesExceeded, match=text):
                await run
        else:
            (result,) = (await run).tool_results
            assert (type(result), result.content) == (kind, text)
    assert bool(ran) is (place == "after_tool")


async def test_whatever_else_a_hook_raises_ends_the_run_and_undoes_the_step() -> None:
    class Broken(Hooks):
        async def after_model(self, ctx: RunContext, response: ModelResponse) -> None:
            raise ZeroDivisionError("in a hook")

    async with Agent(TestModel(), hooks=[Broken()]).session() as session:
        with pytest.raises(ZeroDivisionError):
            await session.step("Go")
        assert session.messages == ()


class Wrong(Hooks):
    """Gives what it should not."""

    def __init__(self, what: Any) -> None:
        self.what = what

    async def before_model(self, ctx: RunContext, turn: ModelTurn) -> Any:
        return self.what if isinstance(self.what, int) else None

    async def before_tool(self, ctx: RunContext, call: ToolCallPart) -> Any:
        return self.what


@pytest.mark.parametrize(
    ("what", "says"),
    [
        (3, "Wrong.before_model returned 3: give ModelTurn, or None"),
        ("x", "Wrong.before_tool returned 'x': give ToolCallPart, or None"),
        (ToolCallPart(tool_name="other"), "turned 'double' into another call"),
    ],
)
async def test_a_hook_that_gives_something_else_is_named(what: Any, says: str) -> None:
    agent = Agent(FunctionModel(ask_double), tools=[double], hooks=[Wrong(what)])
    with pytest.raises(UserError, match=says):
        await agent.run("Go")


async def test_output_tools_are_no_tools_to_hooks() -> None:
    log: list[str] = []
    agent = Agent(TestModel(), output_type=ToolOutput(int), hooks=[Diary("a", log)])
    assert (await agent.run("Go")).output == 0
    assert not any("final_result" in line for line in log)


async def test_an_input_guard_stops_a_run_before_the_model_is_asked() -> None:
    def never(messages: list[ModelMessage], turn: ModelTurn) -> str:
        raise AssertionError("the model was asked")

    agent = Agent(FunctionModel(never), deps_type=list[str])

    @agent.input_guard
    async def no_secrets(ctx: RunContext[list[str]], prompt: str) -> str | None:
        found = [word for word in ctx.deps if word in prompt]
        return f"it mentions {found[0]}" if found else None

    async with agent.session(deps=["swordfish"]) as session:
        with pytest.raises(
            GuardrailTripped, match="'no_secrets' stopped the run: it men"
        ) as caught:
            await session.step("The word is swordfish")
        assert session.messages == ()
        assert session.usage.requests == 0
    assert caught.value.place == "input"
    assert caught.value.value == "The word is swordfish"


@pytest.mark.parametrize("output_type", [int, ToolOutput(int)], ids=["native", "tool"])
async def test_an_output_guard_sees_what_validators_leave_and_stops_the_run(
    output_type: Any,
) -> None:
    agent: Agent[object, int] = Agent(TestModel(seed=4), output_type=output_type)

    @agent.output_validator
    def more(output: int) -> int:
        return output + 100

    @agent.output_guard
    def small(output: int) -> str | None:
        return None if output < 100 else f"{output} is too much"

    with pytest.raises(
        GuardrailTripped, match="output guard 'small' stopped the run: 104"
    ) as caught:
        await agent.run("Go")
    assert (caught.value.guard, caught.value.place, caught.value.value) == ("small", "output", 104)


async def test_an_output_guard_sees_outputs_of_every_step_type() -> None:
    seen: list[Any] = []
    agent = Agent(TestModel(seed=3))
    agent.output_guard(seen.append)
    async with agent.session() as session:
        await session.step("Go", output_type=int)
        await session.step("Go", output_type=str)
    assert seen == [3, "success (no tool calls)"]


@pytest.mark.parametrize("given", [True, False, 0])
async def test_a_guard_that_answers_yes_or_no_is_corrected(given: Any) -> None:
    agent = Agent(TestModel())

    @agent.input_guard
    def is_fine(prompt: str) -> Any:
        return given

    with pytest.raises(UserError, match=f"input guard 'is_fine' returned {given}: return None"):
        await agent.run("Go")
