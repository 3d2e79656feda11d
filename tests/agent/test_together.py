"""Features in one run: each is tested alone elsewhere, here they meet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dspark_agent import (
    Agent,
    ApprovalRequired,
    Compaction,
    DeferredToolRequests,
    DeferredToolResults,
    FunctionModel,
    FunctionToolset,
    Handoff,
    Hooks,
    ModelMessage,
    ModelResponse,
    ModelRetry,
    ModelTurn,
    RequestUsage,
    RetryPromptPart,
    RunContext,
    SqliteJournal,
    TextPart,
    Tool,
    ToolCallPart,
    ToolOutput,
    ToolReturnPart,
)

pytestmark = pytest.mark.anyio

Answer = Callable[[Sequence[ModelMessage], ModelTurn], Any]


class DiedError(Exception):
    """The process is gone, as far as the journal can tell."""


class Mortal:
    """A journal whose process dies instead of writing its n-th entry."""

    def __init__(self, inner: SqliteJournal, dies_at: int | None) -> None:
        self.inner = inner
        self.left = dies_at

    def open(self, run_id: str) -> Any:
        log = self.inner.open(run_id)
        append = log.append

        def mortal(entry: str) -> None:
            if self.left == 0:
                raise DiedError
            if self.left is not None:
                self.left -= 1
            append(entry)

        log.append = mortal  # type: ignore[method-assign]
        return log


def told(messages: Sequence[ModelMessage], *kinds: type) -> list[Any]:
    return [part for message in messages for part in message.parts if isinstance(part, kinds)]


def call(name: str, /, call_id: str = "", **args: Any) -> ToolCallPart:
    return ToolCallPart(tool_name=name, args=args, **({"tool_call_id": call_id} if call_id else {}))


async def outlives(agent: Callable[[], Agent[Any, Any]], folder: Path, check: Any) -> None:
    """Run to the end; then again, killed before each entry in turn and resumed."""
    whole = await agent().run("Go", journal=SqliteJournal(folder / "whole"), run_id="r")
    check(whole)
    dies_at, died = 1, True
    while died:
        journal = SqliteJournal(folder / f"died at {dies_at}")
        died = False
        try:
            await agent().run("Go", journal=Mortal(journal, dies_at), run_id="r")
        except DiedError:
            died = True
            resumed = await agent().resume("r", journal=journal)
            check(resumed)
            assert resumed.output == whole.output
            assert resumed.usage == whole.usage
        dies_at += 1
    assert dies_at > 4


# -- journals ------------------------------------------------------------------------------------


async def test_a_refused_output_call_is_told_the_same_after_a_crash(tmp_path: Path) -> None:
    checked: list[int] = []

    def answer(messages: Sequence[ModelMessage], turn: ModelTurn) -> Any:
        return call("final_result", f"c{len(messages)}", n=len(messages))

    def made() -> Agent[Any, Any]:
        agent = Agent(
            FunctionModel(answer), output_type=ToolOutput(_numbered), output_retries=3, retries=3
        )

        @agent.output_validator
        def third(n: int) -> int:
            checked.append(n)
            if n < 5:
                raise ModelRetry(f"{n} is too small ({len(checked)})")
            return n

        return agent

    def check(result: Any) -> None:
        assert result.output == 5
        refused = told(result.all_messages(), RetryPromptPart)
        assert [part.tool_call_id for part in refused] == ["c1", "c3"]

    await outlives(made, tmp_path, check)


def _numbered(n: int) -> int:
    """Give the answer."""
    return n


_numbered.__name__ = "final_result"


@pytest.mark.parametrize("own", [False, True], ids=["by the model", "by a function"])
async def test_a_shortened_conversation_outlives_its_process(tmp_path: Path, own: bool) -> None:
    def answer(messages: Sequence[ModelMessage], turn: ModelTurn) -> Any:
        results = told(messages, ToolReturnPart)
        usage = RequestUsage(input_tokens=40 * len(messages), output_tokens=1)
        if turn.tool_choice == "none" and not turn.tools:
            return ModelResponse(parts=(TextPart(content="what mattered"),), usage=usage)
        summed = any("Summary of" in str(part.content) for part in messages[0].parts)
        done = summed and len(results) > 1
        part = (
            TextPart(content="done")
            if done
            else call("look", f"c{len(results)}{summed}", n=len(results))
        )
        return ModelResponse(parts=(part,), usage=usage)

    looked: list[int] = []

    async def look(n: int) -> int:
        """Look."""
        looked.append(n)
        return len(looked)

    def summarise(messages: Sequence[ModelMessage]) -> str:
        return f"{len(messages)} messages"

    def made() -> Agent[Any, Any]:
        return Agent(
            FunctionModel(answer),
            tools=[Tool(look, idempotent=True)],
            compaction=Compaction(
                window=200, at=0.9, summary_tokens=5, summarise=summarise if own else None
            ),
        )

    def check(result: Any) -> None:
        assert result.output == "done"
        (record,) = result.compactions
        assert record.summary == ("3 messages" if own else "what mattered")
        assert len(record.left_out) == 3

    await outlives(made, tmp_path, check)


async def test_a_handover_outlives_its_process(tmp_path: Path) -> None:
    given: list[str] = []

    def second_answer(messages: Sequence[ModelMessage], turn: ModelTurn) -> Any:
        return "refunded" if told(messages, ToolReturnPart)[1:] else call("look", "c9")

    def look() -> str:
        """Look."""
        return "seen"

    def made() -> Agent[Any, Any]:
        second = Agent(
            FunctionModel(second_answer), name="second", tools=[Tool(look, idempotent=True)]
        )

        @second.instructions
        def who() -> str:
            given.append("second")
            return f"You are the second ({len(given)})."

        def first_answer(messages: Sequence[ModelMessage], turn: ModelTurn) -> Any:
            return call("transfer_to_second", "c1", reason="money")

        return Agent(
            FunctionModel(first_answer),
            name="first",
            tools=[Handoff(second)],
            instructions="One.",
        )

    def check(result: Any) -> None:
        assert (result.output, result.agent_name) == ("refunded", "second")
        assert "You are the second" in str(result.all_messages()[0].parts[0].content)

    await outlives(made, tmp_path, check)


@pytest.mark.parametrize("journaled", [False, True])
async def test_a_tool_forks_what_was_said_before_its_step(tmp_path: Path, journaled: bool) -> None:
    heard: list[int] = []

    def answer(messages: Sequence[ModelMessage], turn: ModelTurn) -> Any:
        heard.append(len(messages))
        if told(messages, ToolReturnPart):
            return "done"
        return call("aside", "c1") if turn.tools else "from the side"

    async def aside(ctx: RunContext[None]) -> str:
        """Think aside."""
        async with await ctx.fork() as fork:
            return (await fork.step("What do you think?", tools=[])).output

    agent = Agent(FunctionModel(answer), tools=[aside])
    journal = SqliteJournal(tmp_path / "runs") if journaled else None
    run = partial(agent.run, journal=journal, run_id="r") if journaled else agent.run
    result = await run("Go")
    assert result.output == "done"
    (returned,) = told(result.all_messages(), ToolReturnPart)
    assert returned.content == "from the side"
    assert heard == [1, 1, 3]
    assert result.usage.requests == 3


# -- approvals -----------------------------------------------------------------------------------


async def test_an_answer_beside_a_call_that_waits_is_too_early() -> None:
    def answer(messages: Sequence[ModelMessage], turn: ModelTurn) -> Any:
        early = told(messages, ToolReturnPart)
        if early:
            return call("final_result", "c3", n=len(early))
        return [call("look", "c0"), call("pay", "c1"), call("final_result", "c2", n=0)]

    def look() -> str:
        """Look."""
        return "seen"

    def pay() -> str:
        """Pay."""
        return "paid"

    agent: Agent[Any, Any] = Agent(
        FunctionModel(answer),
        output_type=[ToolOutput(_numbered), DeferredToolRequests],
        tools=[look, Tool(pay, requires_approval=True)],
    )
    paused = await agent.run("Go")
    assert [each.tool_name for each in paused.output.approvals] == ["pay"]
    decided = DeferredToolResults(approvals={"c1": True})
    result = await agent.run(message_history=paused.history, deferred_tool_results=decided)
    contents = [part.content for part in told(result.all_messages(), ToolReturnPart)]
    assert contents[:2] == ["seen", "paid"]
    assert contents[2].startswith("Not used: other calls of this turn wait")
    assert result.output == 3


async def test_a_hook_may_ask_for_approval_and_shows_the_call_as_it_would_run() -> None:
    class Bank(Hooks[Any]):
        async def before_tool(self, ctx: RunContext[Any], call: ToolCallPart) -> ToolCallPart:
            if not ctx.tool_call_approved:
                raise ApprovalRequired({"why": "money"})
            return call.model_copy(update={"args": {"amount": 7}})

    def answer(messages: Sequence[ModelMessage], turn: ModelTurn) -> Any:
        return "done" if told(messages, ToolReturnPart) else call("pay", "c1", amount=5)

    paid: list[int] = []

    def pay(amount: int) -> str:
        """Pay."""
        paid.append(amount)
        return "paid"

    agent: Agent[Any, Any] = Agent(
        FunctionModel(answer),
        output_type=str | DeferredToolRequests,
        tools=[pay],
        hooks=[Bank()],
    )
    paused = await agent.run("Go")
    assert paused.output.metadata == {"c1": {"why": "money"}}
    assert paid == []
    decided = DeferredToolResults(approvals={"c1": True})
    result = await agent.run(message_history=paused.history, deferred_tool_results=decided)
    assert (result.output, paid) == ("done", [7])


@pytest.mark.parametrize(
    ("own", "rule", "waits"),
    [
        (False, True, [1, 2]),
        (False, lambda ctx, args: args["n"] == 2, [2]),
        (lambda ctx, args: args["n"] == 1, lambda ctx, args: args["n"] == 2, [1, 2]),
        (True, lambda ctx, args: False, [1, 2]),
        (True, False, [1, 2]),
        (False, False, []),
    ],
)
async def test_a_toolset_is_put_under_a_rule(own: Any, rule: Any, waits: list[int]) -> None:
    def answer(messages: Sequence[ModelMessage], turn: ModelTurn) -> Any:
        done = told(messages, ToolReturnPart)
        return "done" if done else [call("note", n=1), call("note", n=2)]

    def note(n: int) -> int:
        """Note."""
        return n

    plain: FunctionToolset[Any] = FunctionToolset([Tool(note, requires_approval=own)])
    agent: Agent[Any, Any] = Agent(
        FunctionModel(answer),
        output_type=str | DeferredToolRequests,
        toolsets=[plain.approval_required(rule)],
    )
    output = (await agent.run("Go")).output
    found = [] if output == "done" else [each.args["n"] for each in output.approvals]
    assert found == waits
    assert plain.tools["note"].requires_approval is own


async def test_a_handoff_beside_a_call_that_waits_is_carried_out_after_it() -> None:
    second = Agent(FunctionModel(lambda messages, turn: "from the second"), name="second")

    def answer(messages: Sequence[ModelMessage], turn: ModelTurn) -> Any:
        return [call("transfer_to_second", "c1", reason="money"), call("pay", "c2")]

    def pay() -> str:
        """Pay."""
        return "paid"

    agent: Agent[Any, Any] = Agent(
        FunctionModel(answer),
        output_type=str | DeferredToolRequests,
        tools=[Handoff(second), Tool(pay, requires_approval=True)],
    )
    paused = await agent.run("Go")
    decided = DeferredToolResults(approvals={"c2": False})
    result = await agent.run(message_history=paused.history, deferred_tool_results=decided)
    assert (result.output, result.agent_name) == ("from the second", "second")


# -- traces --------------------------------------------------------------------------------------


async def test_approved_calls_and_the_agents_inside_them_are_on_the_timeline() -> None:
    helper = Agent(FunctionModel(lambda messages, turn: "help"), name="helper")
    tool = helper.as_tool(description="Helps.").with_approval(True)

    def answer(messages: Sequence[ModelMessage], turn: ModelTurn) -> Any:
        return "done" if told(messages, ToolReturnPart) else call("helper", "c1", prompt="Help")

    agent: Agent[Any, Any] = Agent(
        FunctionModel(answer), output_type=str | DeferredToolRequests, tools=[tool]
    )
    paused = await agent.run("Go")
    ((waiting,),) = [step.tools for step in paused.timeline().steps]
    assert waiting.outcome == "waiting"
    decided = DeferredToolResults(approvals={"c1": True})
    result = await agent.run(message_history=paused.history, deferred_tool_results=decided)
    settled, inside, after = result.timeline().steps
    assert [tool.outcome for tool in settled.tools] == ["success"]
    assert (inside.agent, inside.parent) == ("helper", 0)
    assert after.begin_s >= settled.end_s
    assert result.steps[0].metrics.tool_s == pytest.approx(settled.metrics.tool_s)


async def test_replayed_turns_are_marked_and_a_successor_is_watched_too(tmp_path: Path) -> None:
    seen: list[tuple[str, bool]] = []

    class Look:
        def run(self, run: Any) -> Any:
            return nullcontext()

        def step(self, step: Any) -> Any:
            return nullcontext()

        def turn(self, step: Any, messages: Any, turn: Any) -> Any:
            seen.append((step.agent, step.is_replayed))
            return nullcontext()

        def tool(self, tool: Any) -> Any:
            return nullcontext()

    second = Agent(FunctionModel(lambda messages, turn: "two"), name="second")

    def answer(messages: Sequence[ModelMessage], turn: ModelTurn) -> Any:
        return call("transfer_to_second", "c1", reason="money")

    agent = Agent(FunctionModel(answer), name="first", tools=[Handoff(second)])
    agent.instrument(Look())
    journal = SqliteJournal(tmp_path / "runs")
    await agent.run("Go", journal=journal, run_id="r")
    assert seen == [("first", False), ("second", False)]
    await agent.resume("r", journal=journal)
    assert seen[2:] == [("first", True), ("second", True)]
