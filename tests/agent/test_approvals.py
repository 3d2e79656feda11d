"""Calls that wait for approval: the run pauses, travels as JSON, and goes on as was decided."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from dspark_agent import (
    Agent,
    AgentEvent,
    ApprovalRequired,
    DeferredToolRequests,
    DeferredToolResults,
    FunctionModel,
    History,
    ModelMessage,
    ModelRequest,
    ModelResponse,
    ModelRetry,
    ModelTurn,
    RunContext,
    SchemaError,
    TextPart,
    Tool,
    ToolApproved,
    ToolCallPart,
    ToolDenied,
    ToolResult,
    ToolReturnPart,
    UnexpectedModelBehavior,
    UsageLimitExceeded,
    UsageLimits,
    UserError,
    tool,
)

pytestmark = pytest.mark.anyio

PAUSING: Any = str | DeferredToolRequests


class Disk:
    """What tools have done: the ground truth of every test here."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def read(self, path: str) -> str:
        """Read."""
        self.done.append(f"read {path}")
        return f"text of {path}"

    def delete(self, path: str) -> str:
        """Delete."""
        self.done.append(f"delete {path}")
        return f"{path} is gone"


def call(name: str, call_id: str, **args: Any) -> ToolCallPart:
    return ToolCallPart(tool_name=name, args=args, tool_call_id=call_id)


def agent_on(
    disk: Disk, *turns: Any, rule: Any = True, heard: list[list[ModelMessage]] | None = None
) -> Agent[object, Any]:
    """An agent whose model says ``turns``, then "done"; ``delete`` needs approval."""

    def answer(messages: list[ModelMessage], turn: ModelTurn) -> Any:
        if heard is not None:
            heard.append(messages)
        number = sum(isinstance(message, ModelResponse) for message in messages)
        return turns[number] if number < len(turns) else "done"

    return Agent(
        FunctionModel(answer),
        tools=[disk.read, Tool(disk.delete, requires_approval=rule)],
        output_type=PAUSING,
        instructions="Be careful.",
    )


def texts(history: History) -> list[str]:
    """What the model reads about calls, in order."""
    return [
        part.model_text()
        for message in history.messages
        for part in message.parts
        if hasattr(part, "model_text")
    ]


def through_json(history: History) -> History:
    return History.model_validate_json(history.model_dump_json())


async def test_a_run_pauses_before_the_call_and_goes_on_after_approval() -> None:
    disk = Disk()
    agent = agent_on(disk, call("delete", "c1", path="a"))
    paused = await agent.run("Clean up")
    assert paused.output == DeferredToolRequests(approvals=(call("delete", "c1", path="a"),))
    assert disk.done == []
    assert paused.usage.tool_calls == 0
    result = await agent.run(
        message_history=through_json(paused.history),
        deferred_tool_results=DeferredToolResults(approvals={"c1": True}),
    )
    assert result.output == "done"
    assert disk.done == ["delete a"]
    assert result.usage.tool_calls == 1
    assert texts(result.history) == ["a is gone"]
    assert result.steps[0].metrics.tool_s > 0
    assert result.steps[0].metrics.parts_s == pytest.approx(
        result.steps[0].metrics.total_s, rel=0.02
    )


async def test_requests_and_decisions_travel_as_json() -> None:
    disk = Disk()
    agent = agent_on(disk, call("delete", "c1", path="a"))
    requests = (await agent.run("Go")).output
    assert isinstance(requests, DeferredToolRequests)
    assert DeferredToolRequests.model_validate_json(requests.model_dump_json()) == requests
    decided = DeferredToolResults(
        approvals={
            "a": True,
            "b": False,
            "c": ToolApproved(override_args={"path": "b"}),
            "d": ToolDenied(message="no"),
        },
        calls={"e": {"n": [1, 2.5, None]}},
    )
    assert DeferredToolResults.model_validate_json(decided.model_dump_json()) == decided
    with pytest.raises(ValidationError):
        DeferredToolResults.model_validate_json('{"approvals": {"a": "yes"}}')


@pytest.mark.parametrize(
    ("decision", "done", "reads", "outcome"),
    [
        (True, ["delete a"], "a is gone", "success"),
        (ToolApproved(), ["delete a"], "a is gone", "success"),
        (False, [], "The tool call was denied.", "denied"),
        (ToolDenied(message="It is in use."), [], "It is in use.", "denied"),
        (
            ToolApproved(override_args={"path": "b"}),
            ["delete b"],
            'b is gone\n\nNote: the call was approved with other arguments: {"path": "b"}',
            "success",
        ),
    ],
    ids=["yes", "approved", "no", "denied", "edited"],
)
async def test_each_decision_is_carried_out_and_the_model_is_told(
    decision: Any, done: list[str], reads: str, outcome: str
) -> None:
    disk = Disk()
    agent = agent_on(disk, call("delete", "c1", path="a"))
    paused = await agent.run("Go")
    result = await agent.run(
        message_history=through_json(paused.history),
        deferred_tool_results=DeferredToolResults(approvals={"c1": decision}),
    )
    assert disk.done == done
    assert texts(result.history) == [reads]
    part = result.new_messages()[0].parts[0]
    assert isinstance(part, ToolReturnPart)
    assert part.outcome == outcome
    # What the model wrote stays as it wrote it: its token log cannot be edited.
    assert result.history.messages[1] == paused.history.messages[1]


async def test_a_result_found_elsewhere_stands_for_the_call() -> None:
    disk = Disk()
    agent = agent_on(disk, call("delete", "c1", path="a"))
    paused = await agent.run("Go")
    result = await agent.run(
        message_history=paused.history,
        deferred_tool_results=DeferredToolResults(calls={"c1": {"freed": 12}}),
    )
    assert (disk.done, texts(result.history)) == ([], ['{"freed":12}'])


async def test_calls_that_need_no_approval_are_run_at_once_and_order_is_kept() -> None:
    disk = Disk()
    heard: list[list[ModelMessage]] = []
    agent = agent_on(
        disk,
        [
            call("delete", "c1", path="a"),
            call("read", "c2", path="b"),
            call("delete", "c3", path="c"),
        ],
        heard=heard,
    )
    paused = await agent.run("Go")
    assert disk.done == ["read b"]
    assert [c.tool_call_id for c in paused.output.approvals] == ["c1", "c3"]
    assert [part.tool_call_id for part in paused.steps[0].tool_results] == ["c2"]
    await agent.run(
        "And be quick.",
        message_history=through_json(paused.history),
        deferred_tool_results=DeferredToolResults(approvals={"c3": True, "c1": False}),
    )
    assert disk.done == ["read b", "delete c"]
    answers = heard[-1][-1].parts
    assert [getattr(part, "tool_call_id", None) for part in answers] == ["c1", "c2", "c3", None]
    assert len(heard[-1]) == 3


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
async def test_a_rule_decides_call_by_call(asynchronous: bool) -> None:
    def rule(ctx: RunContext[Any], args: dict[str, Any]) -> bool:
        assert ctx.tool_name == "delete"
        return str(args["path"]).startswith("important")

    async def slow_rule(ctx: RunContext[Any], args: dict[str, Any]) -> bool:
        return rule(ctx, args)

    disk = Disk()
    agent = agent_on(
        disk,
        call("delete", "c1", path="scratch"),
        call("delete", "c2", path="important"),
        rule=slow_rule if asynchronous else rule,
    )
    paused = await agent.run("Go")
    assert disk.done == ["delete scratch"]
    assert [c.tool_call_id for c in paused.output.approvals] == ["c2"]


async def test_a_tool_asks_for_approval_itself_with_what_it_found() -> None:
    sent: list[float] = []

    def pay(ctx: RunContext[object], amount: float) -> str:
        """Pay."""
        if amount > 100 and not ctx.tool_call_approved:
            raise ApprovalRequired({"balance": 250})
        sent.append(amount)
        return "paid"

    agent = Agent(
        FunctionModel(
            lambda messages, turn: call("pay", "c1", amount=500) if len(messages) == 1 else "ok"
        ),
        tools=[pay],
        output_type=PAUSING,
    )
    paused = await agent.run("Pay")
    assert paused.output.metadata == {"c1": {"balance": 250}}
    assert sent == []
    approved = DeferredToolResults(approvals={"c1": True})
    result = await agent.run(message_history=paused.history, deferred_tool_results=approved)
    assert (result.output, sent) == ("ok", [500])


async def test_a_tool_that_never_has_enough_approval_is_an_error() -> None:
    def stubborn() -> None:
        """Stubborn."""
        raise ApprovalRequired

    def odd() -> None:
        """Odd."""
        raise ApprovalRequired({"what": b"\xff"})

    for function, says in ((stubborn, "look at ctx.tool_call_approved"), (odd, "no JSON")):
        agent = Agent(
            FunctionModel(lambda messages, turn, name=function.__name__: call(name, "c1")),  # type: ignore[misc]
            tools=[function],
            output_type=PAUSING,
        )
        with pytest.raises(UserError, match=says):
            await _run_and_approve(agent)


async def _run_and_approve(agent: Agent[object, Any]) -> None:
    paused = await agent.run("Go")
    await agent.run(
        message_history=paused.history,
        deferred_tool_results=DeferredToolResults(approvals={"c1": True}),
    )


async def test_wrong_arguments_go_back_to_the_model_and_to_nobody_else() -> None:
    disk = Disk()
    agent = agent_on(disk, call("delete", "c1", file="a"), call("delete", "c2", path="a"))
    paused = await agent.run("Go")
    assert [c.tool_call_id for c in paused.output.approvals] == ["c2"]
    assert "Wrong arguments for delete" in texts(paused.history)[0]


async def test_an_approved_call_may_still_ask_the_model_to_try_again() -> None:
    def flaky(n: int) -> int:
        """Flaky."""
        if n == 0:
            raise ModelRetry("not zero")
        return n

    agent = Agent(
        FunctionModel(
            lambda messages, turn: call("flaky", f"c{len(messages)}", n=len(messages) // 2)
        ),
        tools=[Tool(flaky, requires_approval=True)],
        output_type=PAUSING,
    )
    first = await agent.run("Go")
    second = await agent.run(
        message_history=first.history,
        deferred_tool_results=DeferredToolResults(approvals={"c1": True}),
    )
    assert texts(second.history) == ["not zero\n\nFix this and try again."]
    assert [c.tool_call_id for c in second.output.approvals] == ["c3"]


async def test_a_session_pauses_and_goes_on_too() -> None:
    disk = Disk()
    agent = agent_on(disk, call("delete", "c1", path="a"))
    async with agent.session() as session:
        step = await session.step("Go")
        assert isinstance(step.output, DeferredToolRequests)
        with pytest.raises(UserError, match="deferred_tool_results"):
            await session.step("Never mind")
        approved = DeferredToolResults(approvals={"c1": True})
        assert (await session.step(deferred_tool_results=approved)).output == "done"
        assert disk.done == ["delete a"]
    async with agent.session() as session:
        assert isinstance((await session.run("Go")).output, DeferredToolRequests)
        assert (await session.run(deferred_tool_results=approved)).output == "done"


async def test_what_an_approved_call_did_stands_though_the_step_fails() -> None:
    disk = Disk()
    failures = [True]

    def answer(messages: list[ModelMessage], turn: ModelTurn) -> Any:
        if len(messages) == 1:
            return call("delete", "c1", path="a")
        if failures:
            failures.pop()
            raise OSError("the server is away")
        return "done"

    tools = [Tool(disk.delete, requires_approval=True)]
    agent = Agent(FunctionModel(answer), tools=tools, output_type=PAUSING)
    async with agent.session() as session:
        await session.step("Go")
        with pytest.raises(OSError, match="away"):
            await session.step(deferred_tool_results=DeferredToolResults(approvals={"c1": True}))
        assert (await session.step()).output == "done"
    assert disk.done == ["delete a"]


async def test_the_events_of_a_paused_and_resumed_run() -> None:
    disk = Disk()
    agent = agent_on(disk, call("delete", "c1", path="a"))
    events: list[AgentEvent] = []
    async with agent.run_stream("Go") as stream:
        paused = await stream.result()
    await agent.run(
        message_history=paused.history,
        deferred_tool_results=DeferredToolResults(approvals={"c1": True}),
        on_event=events.append,
    )
    assert isinstance(events[0], ToolResult)
    assert (events[0].step, events[0].index, events[0].part.content) == (0, 0, "a is gone")
    assert events[0].seconds > 0


async def test_limits_hold_for_approved_calls() -> None:
    disk = Disk()
    agent = agent_on(disk, call("delete", "c1", path="a"))
    paused = await agent.run("Go")
    with pytest.raises(UsageLimitExceeded, match="tool_calls_limit of 0"):
        await agent.run(
            message_history=paused.history,
            deferred_tool_results=DeferredToolResults(approvals={"c1": True}),
            limits=UsageLimits(tool_calls_limit=0),
        )
    assert disk.done == []


@pytest.mark.parametrize(
    ("results", "says"),
    [
        (DeferredToolResults(), r"no decision about c1 \(delete\); waiting: c1 \(delete\)"),
        (DeferredToolResults(approvals={"c1": True, "x": True}), "no call x waits for a decision"),
        (DeferredToolResults(approvals={"c1": True}, calls={"c1": 1}), "c1 is in calls and in"),
        (
            DeferredToolResults(approvals={"c1": ToolApproved(override_args={"file": "a"})}),
            r"call c1 was approved with arguments that do not fit delete:\n.*path: Field required",
        ),
    ],
    ids=["missing", "unknown", "twice", "wrong arguments"],
)
async def test_decisions_that_do_not_fit_run_nothing(
    results: DeferredToolResults, says: str
) -> None:
    disk = Disk()
    agent = agent_on(disk, call("delete", "c1", path="a"))
    paused = await agent.run("Go")
    with pytest.raises(UserError, match=says):
        await agent.run(message_history=paused.history, deferred_tool_results=results)
    assert disk.done == []


async def test_decisions_where_nothing_waits_are_an_error() -> None:
    agent = agent_on(Disk())
    with pytest.raises(UserError, match="no call c1 waits for a decision; waiting: none"):
        await agent.run("Go", deferred_tool_results=DeferredToolResults(approvals={"c1": True}))


async def test_an_agent_that_lost_its_tool_says_so() -> None:
    disk = Disk()
    paused = await agent_on(disk, call("delete", "c1", path="a")).run("Go")
    other = Agent(FunctionModel(lambda messages, turn: "done"), tools=[disk.read])
    with pytest.raises(UserError, match=r"no tool 'delete' \(any more\); it has: read"):
        await other.run(
            message_history=paused.history,
            deferred_tool_results=DeferredToolResults(approvals={"c1": True}),
        )


async def test_an_output_type_without_a_place_for_the_pause_is_found_at_once() -> None:
    disk = Disk()
    asked: list[int] = []

    def answer(messages: list[ModelMessage], turn: ModelTurn) -> Any:
        asked.append(1)
        return call("delete", "c1", path="a")

    strict = Agent(FunctionModel(answer), tools=[Tool(disk.delete, requires_approval=True)])
    with pytest.raises(UserError, match=r"tool 'delete' needs approval.*DeferredToolRequests"):
        await strict.run("Go")
    assert asked == []
    by_rule = Agent(
        FunctionModel(answer), tools=[Tool(disk.delete, requires_approval=lambda ctx, args: True)]
    )
    with pytest.raises(UserError, match="tool 'delete' needs approval"):
        await by_rule.run("Go")
    assert disk.done == []
    with pytest.raises(SchemaError, match="how a run pauses"):
        Agent(FunctionModel(answer), output_type=DeferredToolRequests)


async def test_the_model_is_not_told_about_pausing() -> None:
    turns: list[ModelTurn] = []

    class Plan(BaseModel):
        title: str

    def answer(messages: list[ModelMessage], turn: ModelTurn) -> str:
        turns.append(turn)
        return '{"title": "t"}'

    typed: Any = Plan | DeferredToolRequests
    result = await Agent(FunctionModel(answer), output_type=typed).run("Go")
    assert result.output == Plan(title="t")
    assert turns[0].output_schema == {
        "type": "object",
        "properties": {"title": {"type": "string"}},
        "required": ["title"],
    }
    assert not turns[0].allow_text


async def test_waiting_calls_of_one_id_cannot_be_told_apart() -> None:
    disk = Disk()
    agent = agent_on(disk, [call("delete", "c", path="a"), call("delete", "c", path="b")])
    with pytest.raises(UnexpectedModelBehavior, match="share an id"):
        await agent.run("Go")
    assert disk.done == []


async def test_a_history_with_unanswered_calls_needs_decisions() -> None:
    agent = agent_on(Disk())
    asked = ModelResponse(parts=(call("read", "c1", path="a"), call("delete", "c2", path="a")))
    part = ToolReturnPart(tool_name="read", content="x", tool_call_id="c1")
    for messages in ([asked], [asked, ModelRequest(parts=(part,))]):
        with pytest.raises(UserError, match="no results"):
            await agent.run("Go", message_history=messages)
    said = ModelResponse(parts=(TextPart(content="hello"),))
    assert (await agent.run("Go", message_history=[said])).output == "done"


PROGRAM = """
import sys
from pathlib import Path
from dspark_agent import Agent, DeferredToolRequests, DeferredToolResults, History, TestModel, tool

@tool(requires_approval=True)
def delete(path: str) -> str:
    "Delete."
    with open(sys.argv[1] + "/done", "a") as done:
        done.write("deleted")
    return "gone"

agent = Agent(TestModel(), tools=[delete], output_type=str | DeferredToolRequests)
state = Path(sys.argv[1], "state.json")
if state.exists():
    history = History.model_validate_json(state.read_text())
    decided = DeferredToolResults.model_validate_json(sys.argv[2])
    print(agent.run_sync(message_history=history, deferred_tool_results=decided).output)
else:
    result = agent.run_sync("Go")
    state.write_text(result.history.model_dump_json())
    print(result.output.approvals[0].tool_call_id)
"""


async def test_another_process_goes_on(tmp_path: Any) -> None:
    def process(*args: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(tmp_path), *args],
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    call_id = process()
    assert not (tmp_path / "done").exists()
    assert process(f'{{"approvals": {{"{call_id}": true}}}}') == '{"delete": "gone"}'
    assert (tmp_path / "done").read_text() == "deleted"


def test_the_decorators_take_the_rule_too() -> None:
    agent: Agent[object, Any] = Agent(FunctionModel(lambda m, t: ""), output_type=PAUSING)

    @agent.tool_plain(requires_approval=True, idempotent=True)
    def guarded(path: str) -> None:
        """Guarded."""

    @tool(requires_approval=lambda ctx, args: False, idempotent=True)
    def shared() -> None:
        """Shared."""

    own = agent._declaration.tools["guarded"]
    assert (own.requires_approval, own.idempotent) == (True, True)
    assert callable(shared.requires_approval)
    assert shared.idempotent
