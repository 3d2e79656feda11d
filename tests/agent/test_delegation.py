"""Agents as tools, handoffs and forks: one account, one deadline, one cancellation."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from pydantic import BaseModel

from dspark_agent import (
    Agent,
    DeadlineExceeded,
    FunctionModel,
    Handoff,
    ModelMessage,
    ModelTurn,
    RunCancelled,
    RunContext,
    SchemaError,
    SystemPromptPart,
    TestModel,
    ToolCallPart,
    ToolReturnPart,
    UsageLimitExceeded,
    UsageLimits,
    UserError,
    UserPromptPart,
)

pytestmark = pytest.mark.anyio


class Place(BaseModel):
    name: str
    height: int


def says(*answers: Any) -> FunctionModel:
    """A model that answers with these, one a turn, whoever asks; the last for ever."""
    waiting = list(answers)

    def answer(messages: list[ModelMessage], turn: ModelTurn) -> Any:
        return waiting.pop(0) if len(waiting) > 1 else waiting[0]

    return FunctionModel(answer)


def ask(name: str, prompt: str = "Go") -> ToolCallPart:
    return ToolCallPart(tool_name=name, args={"prompt": prompt})


def boss_of(*subs: Agent[Any, Any], then: str = "done", **options: Any) -> Agent[Any, str]:
    """An agent that asks each of ``subs`` once, all in its first turn, and then answers."""
    tools = [sub.as_tool(description=f"Ask {sub.name}.") for sub in subs]
    calls = [ask(sub.name) for sub in subs]
    return Agent(says(calls, then), name="boss", tools=tools, **options)


def returned(result: Any) -> list[ToolReturnPart]:
    parts = [part for message in result.all_messages() for part in message.parts]
    return [part for part in parts if isinstance(part, ToolReturnPart)]


# -- as a tool ---------------------------------------------------------------------------------


async def test_the_output_of_an_agent_is_the_result_of_its_tool() -> None:
    sub = Agent(TestModel(), name="surveyor", output_type=Place)
    result = await boss_of(sub).run("Go")
    (part,) = returned(result)
    assert part.content == Place(name="a", height=0) or isinstance(part.content, Place)
    assert '"height":' in part.model_text()
    assert result.output == "done"
    assert result.agent_name == "boss"


async def test_what_the_parts_use_adds_up_in_the_whole() -> None:
    inner = Agent(TestModel(custom_output_text="one two three"), name="inner")
    outer = boss_of(inner, then="four five")
    top = Agent(says(ask("outer"), "six"), tools=[outer.as_tool(description="Ask.", name="outer")])
    result = await top.run("Go")
    assert result.usage.requests == 2 + 2 + 1
    assert result.usage.tool_calls == 1 + 1
    own = sum(step.response.usage.output_tokens for step in result.steps)
    assert own == 3 + 1  # the call (its name, two words of JSON), and "six"
    assert result.usage.output_tokens == own + (3 + 2) + 3


async def test_the_callers_request_limit_holds_inside_and_ends_the_callers_run() -> None:
    sub = Agent(says(ToolCallPart(tool_name="tick")), name="sub", tools=[Counter().tick])
    limits = UsageLimits(request_limit=4, repeat_call_limit=None)
    with pytest.raises(UsageLimitExceeded) as caught:
        await boss_of(sub).run("Go", limits=limits)
    assert caught.value.limits is limits
    assert caught.value.limit == 4


async def test_parallel_parts_cannot_pass_a_limit_together() -> None:
    turns = 0

    async def answer(messages: list[ModelMessage], turn: ModelTurn) -> ToolCallPart:
        nonlocal turns
        turns += 1
        await anyio.sleep(0.001)
        return ToolCallPart(tool_name="tick", args={})

    counter = Counter()
    subs = [Agent(FunctionModel(answer), name=f"sub{n}", tools=[counter.tick]) for n in range(6)]
    limits = UsageLimits(request_limit=10, repeat_call_limit=None)
    with pytest.raises(UsageLimitExceeded):
        await boss_of(*subs).run("Go", limits=limits)
    assert turns <= 9  # the boss took the tenth


async def test_an_agents_own_limits_are_told_to_the_caller() -> None:
    limits = UsageLimits(request_limit=2, repeat_call_limit=None)
    sub = Agent(
        says(ToolCallPart(tool_name="tick")), name="sub", tools=[Counter().tick], limits=limits
    )
    result = await boss_of(sub).run("Go")
    (part,) = returned(result)
    assert part.outcome == "failed"
    assert "sub came to no answer" in part.content
    assert "request_limit of 2" in part.content


async def test_a_refused_output_is_told_to_the_caller() -> None:
    sub = Agent(says("no number"), name="sub", output_type=int)
    (part,) = returned(await boss_of(sub).run("Go"))
    assert part.outcome == "failed"
    assert "sub came to no answer: the output was rejected" in part.content


async def test_the_callers_deadline_holds_inside() -> None:
    sleeper = Sleeper()
    sub = Agent(sleeper.model, name="sub", limits=UsageLimits(wall_seconds=30))
    with pytest.raises(DeadlineExceeded, match=r"wall_seconds=0\.05"):
        await boss_of(sub).run("Go", limits=UsageLimits(wall_seconds=0.05))
    assert sleeper.running == 0


async def test_an_agents_own_deadline_is_told_to_the_caller() -> None:
    sleeper = Sleeper()
    sub = Agent(sleeper.model, name="sub", limits=UsageLimits(wall_seconds=0.02))
    (part,) = returned(await boss_of(sub).run("Go", limits=UsageLimits(wall_seconds=30)))
    assert "sub came to no answer: not done within wall_seconds=0.02" in part.content
    assert sleeper.running == 0


async def test_cancelling_the_whole_leaves_nothing_running() -> None:
    sleeper = Sleeper()
    inner = [Agent(sleeper.model, name=f"inner{n}") for n in range(3)]
    outer = boss_of(*inner)
    top = Agent(says(ask("outer")), tools=[outer.as_tool(name="outer", description="Ask.")])
    with anyio.move_on_after(0.05) as scope:
        await top.run("Go")
    assert scope.cancelled_caught
    assert sleeper.begun == 3
    assert sleeper.running == 0


async def test_a_part_cancels_the_whole() -> None:
    sleeper = Sleeper()

    async def stop(ctx: RunContext[object]) -> None:
        """Stop."""
        ctx.cancel("seen enough")
        await anyio.sleep(60)

    stops = Agent(says(ToolCallPart(tool_name="stop")), name="stops", tools=[stop])
    sleeps = Agent(sleeper.model, name="sleeps")
    with pytest.raises(RunCancelled, match="seen enough"):
        await boss_of(stops, sleeps).run("Go")
    assert sleeper.running == 0


async def test_the_error_of_a_part_is_the_error_of_the_whole() -> None:
    def breaks() -> None:
        """Break."""
        raise ZeroDivisionError

    sub = Agent(says(ToolCallPart(tool_name="breaks")), name="sub", tools=[breaks])
    with pytest.raises(ZeroDivisionError):
        await boss_of(sub).run("Go")


async def test_deps_are_passed_to_those_who_take_them() -> None:
    seen: list[object] = []

    def look(ctx: RunContext[str]) -> None:
        """Look."""
        seen.append(ctx.deps)

    needs = Agent(TestModel(), name="needs", deps_type=str, tools=[look])
    plain = Agent(TestModel(), name="plain")
    await boss_of(needs, plain, deps_type=str).run("Go", deps="the deps")
    assert seen == ["the deps"]
    with pytest.raises(UserError, match="agent 'needs' needs deps of type str"):
        await boss_of(needs).run("Go")


async def test_a_name_that_is_no_tools_name_is_refused() -> None:
    with pytest.raises(SchemaError, match=r"'a b'.*pass name="):
        Agent(TestModel(), name="a b").as_tool(description="Ask.")


# -- handing over ------------------------------------------------------------------------------


def transfer(name: str) -> ToolCallPart:
    return ToolCallPart(tool_name=f"transfer_to_{name}", args={"reason": "it is theirs"})


async def test_the_other_agent_goes_on_with_its_own_instructions_and_tools() -> None:
    heard: list[tuple[list[ModelMessage], ModelTurn]] = []

    def refund(order: int) -> str:
        """Refund an order."""
        return f"refunded {order}"

    def answer(messages: list[ModelMessage], turn: ModelTurn) -> Any:
        heard.append((messages, turn))
        if len(heard) == 1:
            return ToolCallPart(tool_name="refund", args={"order": 7})
        return '{"name": "refund", "height": 7}'

    billing = Agent(
        FunctionModel(answer),
        name="billing",
        instructions="You refund.",
        tools=[refund],
        output_type=Place,
    )
    triage = Agent(says(transfer("billing")), instructions="You route.", tools=[Handoff(billing)])
    result = await triage.run("I want my money back")
    assert result.output == Place(name="refund", height=7)
    assert result.agent_name == "billing"
    first, turn = heard[0]
    assert list(first[0].parts) == [
        SystemPromptPart(content="You refund."),
        UserPromptPart(content="I want my money back"),
    ]
    assert first[2].parts[0].content == "Transferred to billing."  # type: ignore[union-attr]
    assert turn.tool_names == ("refund",)
    assert [step.index for step in result.steps] == [0, 1, 2]
    assert result.usage.requests == 3
    assert result.usage.tool_calls == 2
    assert result.new_messages() == result.all_messages()
    assert [m.kind for m in result.all_messages()] == ["request", "response"] * 3


async def test_handing_over_and_back_ends_at_the_limit() -> None:
    model = FunctionModel(lambda messages, turn: transfer(turn.tool_names[0][12:]))
    first: Agent[None, str] = Agent(model, name="first")
    second = Agent(model, name="second", tools=[Handoff(first)])
    first._declaration.own_tools.add(Handoff(second))
    with pytest.raises(UsageLimitExceeded, match="request_limit of 7"):
        await first.run("Go", limits=UsageLimits(request_limit=7))


async def test_a_run_that_is_iterated_is_handed_over_too() -> None:
    second = Agent(says("bye"), name="second")
    async with Agent(says(transfer("second")), tools=[Handoff(second)]).iter("Go") as run:
        steps = [step async for step in run]
    assert len(steps) == 2
    assert run.result.output == "bye"
    assert not run.core.is_open


async def test_only_the_first_of_two_handoffs_counts() -> None:
    agents = [Agent(says(f"I am {name}"), name=name) for name in ("one", "two")]
    both = [transfer("two"), transfer("one")]
    result = await Agent(says(both), tools=[Handoff(agent) for agent in agents]).run("Go")
    assert result.output == "I am two"


async def test_a_refused_handoff_does_not_count() -> None:
    other = Agent(says("never"), name="other")
    wrong = ToolCallPart(tool_name="transfer_to_other", args={"reason": 3})
    result = await Agent(says(wrong, "stayed"), tools=[Handoff(other)]).run("Go")
    assert result.output == "stayed"


async def test_a_handoff_that_cannot_open_raises_and_closes() -> None:
    class Broken(TestModel):
        async def open(self, *args: Any, **kwargs: Any) -> Any:
            raise UserError("no such model")

    other = Agent(Broken(), name="other")
    with pytest.raises(UserError, match="no such model"):
        await Agent(says(transfer("other")), tools=[Handoff(other)]).run("Go")


async def test_a_session_stays_with_its_agent() -> None:
    other = Agent(says("never"), name="other")
    async with Agent(says(transfer("other")), tools=[Handoff(other)]).session() as session:
        with pytest.raises(UserError, match="transfer_to_other: a session stays"):
            await session.run("Go")


async def test_history_from_before_is_not_new_after_a_handoff() -> None:
    second = Agent(says("bye"), name="second")
    first = Agent(says("hi", transfer("second")), instructions="One.", tools=[Handoff(second)])
    before = await first.run("Hello")
    after = await first.run("Go", message_history=before.history)
    assert after.output == "bye"
    texts = [part.content for part in after.all_messages()[0].parts]  # type: ignore[union-attr]
    assert texts == ["Hello"]
    assert len(after.new_messages()) == 4
    assert after.new_messages()[0].parts == (UserPromptPart(content="Go"),)


# -- forks as parts ----------------------------------------------------------------------------


async def test_a_tool_forks_the_conversation_from_before_its_step() -> None:
    heard: list[list[ModelMessage]] = []

    def answer(messages: list[ModelMessage], turn: ModelTurn) -> Any:
        heard.append(messages)
        if turn.tool_names:
            return ToolCallPart(tool_name="consider", args={}) if len(heard) == 1 else "done"
        return f"looked at by {len(messages)}"

    async def consider(ctx: RunContext[object]) -> str:
        """Consider."""
        async with await ctx.fork() as fork:
            return str((await fork.step("Consider it.", tools=[])).output)

    agent = Agent(FunctionModel(answer), instructions="Be brief.", tools=[consider])
    result = await agent.run("The question")
    assert [part.content for part in heard[1][0].parts] == [  # type: ignore[union-attr]
        "Be brief.",
        "The question",
        "Consider it.",
    ]
    assert returned(result)[0].content == "looked at by 1"
    assert result.output == "done"
    assert result.usage.requests == 3
    assert len(result.steps) == 2


async def test_a_fork_in_a_tool_is_under_the_runs_limits() -> None:
    async def consider(ctx: RunContext[object]) -> str:
        """Consider."""
        async with await ctx.fork() as fork:
            for _ in range(9):
                await fork.step("Again.", tools=[])
        raise AssertionError("the limit did not hold")

    model = FunctionModel(
        lambda messages, turn: ToolCallPart(tool_name="consider") if turn.tools else "text"
    )
    with pytest.raises(UsageLimitExceeded, match="request_limit of 4"):
        await Agent(model, tools=[consider]).run("Go", limits=UsageLimits(request_limit=4))


async def test_there_is_nothing_to_fork_before_the_first_step() -> None:
    agent = Agent(TestModel())

    @agent.instructions
    async def too_early(ctx: RunContext[object]) -> str:
        await ctx.fork()
        return "never"

    with pytest.raises(UserError, match=r"ctx\.fork\(\).*no step is in flight"):
        await agent.run("Go")


@pytest.mark.parametrize("shares", [True, False])
async def test_a_fork_counts_where_it_is_told_to(shares: bool) -> None:
    limits = UsageLimits(request_limit=3)
    async with Agent(says("text")).session(limits=limits) as session:
        await session.step("One")
        async with await session.fork(shares_limits=shares) as fork:
            await fork.step("Two")
            await fork.step("Three")
            assert fork.usage.requests == 2
            assert session.usage.requests == (3 if shares else 1)
            if shares:
                with pytest.raises(UsageLimitExceeded):
                    await fork.step("Four")
                with pytest.raises(UsageLimitExceeded):
                    await session.step("Four")
            else:
                await fork.step("Four")
                await session.step("Four")


async def test_a_fork_of_a_session_that_is_a_part_is_a_part() -> None:
    async def work(ctx: RunContext[object]) -> str:
        """Work."""
        async with Agent(says("text")).session(parent=ctx) as session:
            await session.step("One")
            async with await session.fork() as fork:
                await fork.step("Two")
        return "ok"

    boss = Agent(says(ToolCallPart(tool_name="work"), "done"), tools=[work])
    assert (await boss.run("Go")).usage.requests == 4


async def test_cancelling_in_a_fork_of_a_session_ends_the_forks_step() -> None:
    async def stop(ctx: RunContext[object]) -> None:
        """Stop."""
        ctx.cancel("enough")
        await anyio.sleep(60)

    agent = Agent(says("text", ToolCallPart(tool_name="stop"), "text"), tools=[stop])
    async with agent.session() as session:
        await session.step("One")
        async with await session.fork(shares_limits=True) as fork:
            with pytest.raises(RunCancelled, match="enough"):
                await fork.step("Two", tool_choice="stop")
            assert (await fork.step("Three")).output == "text"


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def tick(self) -> int:
        """Tick."""
        self.count += 1
        return self.count


class Sleeper:
    """A model that never answers, and counts how many of its turns are going on."""

    def __init__(self) -> None:
        self.begun = 0
        self.running = 0
        self.model = FunctionModel(self.answer)

    async def answer(self, messages: list[ModelMessage], turn: ModelTurn) -> str:
        self.begun += 1
        self.running += 1
        try:
            await anyio.sleep(60)
        finally:
            self.running -= 1
        return "never"
