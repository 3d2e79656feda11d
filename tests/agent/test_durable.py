"""Runs with a journal: what is recorded is not done again, and what does not fit is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest
from pydantic import BaseModel

from dspark_agent import (
    Agent,
    AgentEvent,
    ApprovalRequired,
    DeadlineExceeded,
    DeferredToolRequests,
    DeferredToolResults,
    FunctionModel,
    History,
    JournalError,
    JournalLockedError,
    ModelMessage,
    ModelResponse,
    ModelRetry,
    ModelTurn,
    OutputError,
    RetryPromptPart,
    RunContext,
    SqliteJournal,
    StepEnd,
    TextDelta,
    ToolApproved,
    ToolCallPart,
    ToolInterruptedError,
    ToolReturnPart,
    UsageLimitExceeded,
    UsageLimits,
    UserError,
)

pytestmark = pytest.mark.anyio


class World:
    """What models and tools have really done; ``fails`` are the things that fail once."""

    def __init__(self) -> None:
        self.did: list[str] = []
        self.fails: set[str] = set()

    def do(self, what: str) -> None:
        self.did.append(what)
        if what in self.fails:
            self.fails.remove(what)
            raise OSError(f"{what}: broken")


def call(name: str, call_id: str, /, **args: Any) -> ToolCallPart:
    return ToolCallPart(tool_name=name, args=args, tool_call_id=call_id)


def scripted(world: World, *turns: Any) -> FunctionModel:
    def answer(messages: list[ModelMessage], turn: ModelTurn) -> Any:
        number = sum(isinstance(message, ModelResponse) for message in messages)
        world.do(f"model {number}")
        return turns[number] if number < len(turns) else "done"

    return FunctionModel(answer)


def agent_on(world: World, *turns: Any, **options: Any) -> Agent[object, Any]:
    agent: Agent[object, Any] = Agent(scripted(world, *turns), **options)

    @agent.tool_plain
    def work(n: int) -> str:
        """Work."""
        world.do(f"work {n}")
        return f"result {n}"

    @agent.tool_plain(idempotent=True)
    def check(n: int) -> str:
        """Check."""
        world.do(f"check {n}")
        return f"checked {n}"

    return agent


@pytest.fixture
def journal(tmp_path: Path) -> SqliteJournal:
    return SqliteJournal(tmp_path / "runs.sqlite")


TWO_STEPS = (call("work", "w0", n=0), call("work", "w1", n=1))
ALL_DONE = ["model 0", "work 0", "model 1", "work 1", "model 2"]


async def test_a_recorded_run_is_not_run_again(journal: SqliteJournal) -> None:
    world = World()
    agent = agent_on(world, *TWO_STEPS)
    first = await agent.run("Go", journal=journal, run_id="r")
    assert world.did == ALL_DONE
    for again in (
        await agent.resume("r", journal=journal),
        await agent.run("Go", journal=journal, run_id="r"),
    ):
        assert world.did == ALL_DONE
        assert again.output == first.output == "done"
        assert again.usage == first.usage
        assert [step.metrics for step in again.steps] == [step.metrics for step in first.steps]
        assert [step.tool_results for step in again.steps] == [
            step.tool_results for step in first.steps
        ]
        assert [m.parts for m in again.all_messages()] == [m.parts for m in first.all_messages()]


@pytest.mark.parametrize("broken", ["model 0", "model 1", "model 2"])
async def test_a_run_that_failed_goes_on_where_it_failed(
    journal: SqliteJournal, broken: str
) -> None:
    world = World()
    world.fails = {broken}
    agent = agent_on(world, *TWO_STEPS)
    with pytest.raises(OSError, match="broken"):
        await agent.run("Go", journal=journal, run_id="r")
    assert journal.unfinished() == ["r"]
    assert (await agent.resume("r", journal=journal)).output == "done"
    at = ALL_DONE.index(broken)
    assert world.did == [*ALL_DONE[:at], broken, *ALL_DONE[at:]]
    assert journal.unfinished() == []


async def test_a_tool_that_raised_is_in_doubt_unless_it_is_idempotent(
    journal: SqliteJournal,
) -> None:
    world = World()
    world.fails = {"work 0", "check 1"}
    agent = agent_on(world, [call("work", "w0", n=0)], [call("check", "c1", n=1)])
    with pytest.raises(OSError, match="work 0"):
        await agent.run("Go", journal=journal, run_id="r")
    with pytest.raises(ToolInterruptedError) as caught:
        await agent.resume("r", journal=journal)
    assert caught.value.calls == (("work", "w0"),)
    for says in (str(journal.path), "run 'r', step 0", "work (w0)", "again=True", "idempotent"):
        assert says in str(caught.value)
    mere_approval = DeferredToolResults(approvals={"w0": True})
    with pytest.raises(ToolInterruptedError):
        await agent.resume("r", journal=journal, deferred_tool_results=mere_approval)
    assert world.did == ["model 0", "work 0"]
    again = DeferredToolResults(approvals={"w0": ToolApproved(again=True)})
    with pytest.raises(OSError, match="check 1"):
        await agent.resume("r", journal=journal, deferred_tool_results=again)
    result = await agent.resume("r", journal=journal)
    assert result.interrupted == (call("check", "c1", n=1),)
    assert world.did == [
        *["model 0", "work 0", "work 0", "model 1", "check 1", "check 1", "model 2"]
    ]


@pytest.mark.parametrize(
    ("results", "content", "outcome"),
    [
        (DeferredToolResults(calls={"w0": "found it"}), "found it", "success"),
        (DeferredToolResults(approvals={"w0": False}), "The tool call was denied.", "denied"),
    ],
    ids=["result", "denial"],
)
async def test_a_call_in_doubt_can_be_settled_by_hand(
    journal: SqliteJournal, results: DeferredToolResults, content: str, outcome: str
) -> None:
    world = World()
    world.fails = {"work 0", "model 1"}
    agent = agent_on(world, call("work", "w0", n=0))
    with pytest.raises(OSError, match="work 0"):
        await agent.run("Go", journal=journal, run_id="r")
    with pytest.raises(OSError, match="model 1"):
        await agent.resume("r", journal=journal, deferred_tool_results=results)
    settled = await agent.resume("r", journal=journal)  # it is in the journal by now
    part = settled.steps[0].tool_results[0]
    assert isinstance(part, ToolReturnPart)
    assert (part.content, part.outcome) == (content, outcome)
    assert world.did.count("work 0") == 1


async def test_a_cancelled_run_goes_on_and_its_cancelled_tool_is_in_doubt(
    journal: SqliteJournal,
) -> None:
    world = World()

    async def slow(ctx: RunContext[object]) -> str:
        """Slow."""
        world.do("slow")
        await anyio.sleep(60 if world.did.count("slow") == 1 else 0)
        return "slept"

    for idempotent, run_id in ((True, "a"), (False, "b")):
        world.did.clear()
        agent = agent_on(world, [call("check", "c", n=0), call("slow", "s")])
        agent._declaration.own_tools.add(slow, idempotent=idempotent)
        with pytest.raises(DeadlineExceeded):
            await agent.run(
                "Go", journal=journal, run_id=run_id, limits=UsageLimits(wall_seconds=0.3)
            )
        if idempotent:
            result = await agent.resume(run_id, journal=journal)
            assert [part.content for part in result.steps[0].tool_results] == ["checked 0", "slept"]
            assert world.did.count("check 0") == 1
        else:
            with pytest.raises(ToolInterruptedError, match=r"slow \(s\)"):
                await agent.resume(run_id, journal=journal)


async def test_a_pause_waits_in_the_journal(journal: SqliteJournal) -> None:
    world = World()

    def pay(ctx: RunContext[object], amount: int) -> str:
        """Pay."""
        if not ctx.tool_call_approved:
            raise ApprovalRequired({"balance": 3})
        world.do(f"pay {amount}")
        return "paid"

    output_type: Any = str | DeferredToolRequests
    turns = ([call("pay", "p0", amount=1), call("work", "w0", n=0)], call("pay", "p1", amount=2))
    agent = agent_on(world, *turns, output_type=output_type, tools=[pay])
    paused = await agent.run("Go", journal=journal, run_id="r")
    assert paused.output.metadata == {"p0": {"balance": 3}}
    for _ in range(2):
        again = await agent.resume("r", journal=journal)
        assert again.output == paused.output
    assert world.did == ["model 0", "work 0"]
    yes = DeferredToolResults(approvals={"p0": True})
    second = await agent.resume("r", journal=journal, deferred_tool_results=yes)
    assert [c.tool_call_id for c in second.output.approvals] == ["p1"]
    # The same decision once more changes nothing, and is none about the call that waits now.
    other = DeferredToolResults(approvals={"p0": False})
    for results in (None, yes, other):
        again = await agent.resume("r", journal=journal, deferred_tool_results=results)
        assert again.output == second.output
    last = DeferredToolResults(approvals={"p1": ToolApproved(override_args={"amount": 5})})
    done = await agent.resume("r", journal=journal, deferred_tool_results=last)
    assert done.output == "done"
    assert world.did == ["model 0", "work 0", "pay 1", "model 1", "pay 5", "model 2"]
    replayed = await agent.resume("r", journal=journal)
    assert [m.parts for m in replayed.all_messages()] == [m.parts for m in done.all_messages()]


async def test_decisions_that_cannot_be_carried_out_are_not_recorded(
    journal: SqliteJournal,
) -> None:
    world = World()
    output_type: Any = str | DeferredToolRequests
    agent = agent_on(world, call("guarded", "g", n=1), output_type=output_type)

    @agent.tool_plain(requires_approval=True)
    def guarded(n: int) -> int:
        """Guarded."""
        return n

    await agent.run("Go", journal=journal, run_id="r")
    wrong = DeferredToolResults(approvals={"g": ToolApproved(override_args={"m": 1})})
    with pytest.raises(UserError, match="do not fit guarded"):
        await agent.resume("r", journal=journal, deferred_tool_results=wrong)
    right = DeferredToolResults(approvals={"g": True})
    assert (await agent.resume("r", journal=journal, deferred_tool_results=right)).output == "done"


async def test_steps_that_the_caller_narrows_are_recorded_too(journal: SqliteJournal) -> None:
    world = World()
    world.fails = {"model 2"}
    agent = agent_on(world, *TWO_STEPS)

    async def drive(*choices: str) -> list[str]:
        async with agent.iter("Go", journal=journal, run_id="r") as run:
            for choice in choices:
                await run.step(tool_choice=choice)
            return [step.kind for step in run.steps]

    with pytest.raises(OSError, match="model 2"):
        await drive("work", "required", "none")
    kinds = await drive("work", "required", "none")
    assert kinds == ["tool_call", "tool_call", "text"]
    assert world.did == [*ALL_DONE, "model 2"]
    with pytest.raises(JournalError, match=r"run 'r': what the model is asked in step 1 is not"):
        await drive("work", "check", "none")


async def test_a_failed_step_taken_again_in_the_same_run_asks_nothing_twice(
    journal: SqliteJournal,
) -> None:
    world = World()
    world.fails = {"check 0"}
    agent = agent_on(world, call("check", "c", n=0))
    async with agent.iter("Go", journal=journal, run_id="r") as run:
        with pytest.raises(OSError, match="check 0"):
            await run.step()
        async for _ in run:
            pass
    assert world.did == ["model 0", "check 0", "check 0", "model 1"]
    assert run.result.interrupted == (call("check", "c", n=0),)


async def test_a_stream_tells_a_resumed_run_from_its_begin(journal: SqliteJournal) -> None:
    world = World()
    world.fails = {"model 2"}
    agent = agent_on(world, *TWO_STEPS)
    events: list[AgentEvent] = []
    with pytest.raises(OSError, match="model 2"):
        await agent.run("Go", journal=journal, run_id="r")
    async with agent.run_stream("Go", journal=journal, run_id="r") as stream:
        events = [event async for event in stream]
    assert [event.step for event in events if isinstance(event, StepEnd)] == [0, 1, 2]
    assert "".join(event.delta for event in events if isinstance(event, TextDelta)) == "done"
    streamed: list[AgentEvent] = []
    await agent.resume("r", journal=journal, on_event=streamed.append)
    assert [type(event) for event in streamed] == [type(event) for event in events]


async def test_a_model_is_opened_only_when_it_is_needed(journal: SqliteJournal) -> None:
    class Counting(FunctionModel):
        opened = 0

        async def open(self, *args: Any, **kwargs: Any) -> Any:
            self.opened += 1
            return await super().open(*args, **kwargs)

    model = Counting(lambda messages, turn: "done")
    agent = Agent(model)
    await agent.run("Go", journal=journal, run_id="r")
    await agent.resume("r", journal=journal)
    assert model.opened == 1


async def test_another_model_goes_on_with_all_that_was_said(journal: SqliteJournal) -> None:
    world = World()
    world.fails = {"model 1"}
    agent = agent_on(world, call("work", "w0", n=0), instructions="Be brief.")
    with pytest.raises(OSError, match="model 1"):
        await agent.run("Go", journal=journal, run_id="r")
    heard: list[ModelMessage] = []

    def other(messages: list[ModelMessage], turn: ModelTurn) -> str:
        heard.extend(messages)
        return "other"

    result = await agent.resume("r", journal=journal, model=FunctionModel(other, model_name="b"))
    assert result.output == "other"
    kinds = [part.part_kind for message in heard for part in message.parts]
    assert kinds == ["system-prompt", "user-prompt", "tool-call", "tool-return"]


async def test_a_history_is_part_of_what_is_recorded(journal: SqliteJournal) -> None:
    world = World()
    agent = agent_on(world)
    before = (await agent.run("One")).history
    world.fails = {"model 1"}
    with pytest.raises(OSError, match="model 1"):
        await agent.run("Two", message_history=before, journal=journal, run_id="r")
    result = await agent.resume("r", journal=journal)
    assert len(result.all_messages()) == 4
    assert len(result.new_messages()) == 2
    with pytest.raises(JournalError, match="another message_history"):
        await agent.run("Two", journal=journal, run_id="r")
    stored = History.model_validate_json(before.model_dump_json())
    await agent.run("Two", message_history=stored, journal=journal, run_id="r")


async def test_a_refused_output_is_not_judged_again(journal: SqliteJournal) -> None:
    world = World()
    world.fails = {"model 1"}
    agent = agent_on(world, "almost")

    @agent.output_validator
    def strict(output: str) -> str:
        world.do(f"validate {output}")
        if output != "done":
            raise ModelRetry("not done yet")
        return output

    with pytest.raises(OSError, match="model 1"):
        await agent.run("Go", journal=journal, run_id="r")
    await agent.resume("r", journal=journal)
    assert world.did.count("validate almost") == 1


async def test_a_verdict_that_changed_is_an_error(journal: SqliteJournal) -> None:
    world = World()
    strict = False

    agent = agent_on(world)

    @agent.output_validator
    def validate(output: str) -> str:
        if strict:
            raise ModelRetry("no longer good enough")
        return output

    await agent.run("Go", journal=journal, run_id="r")
    strict = True
    with pytest.raises(JournalError, match=r"step 0 is refused now \(no longer good enough\)"):
        await agent.resume("r", journal=journal)


async def test_a_run_ended_by_what_the_model_wrote_ends_so_again(journal: SqliteJournal) -> None:
    class Plan(BaseModel):
        title: str

    world = World()
    agent = agent_on(world, "no", "no", output_type=Plan)
    for _ in range(2):
        with pytest.raises(OutputError, match="not valid JSON"):
            await agent.run("Go", journal=journal, run_id="r")
    assert world.did == ["model 0", "model 1"]


async def test_limits_count_what_is_recorded(journal: SqliteJournal) -> None:
    world = World()
    agent = agent_on(world, *TWO_STEPS)
    limits = UsageLimits(request_limit=2)
    for _ in range(2):
        with pytest.raises(UsageLimitExceeded, match="request_limit of 2"):
            await agent.run("Go", journal=journal, run_id="r", limits=limits)
    assert world.did == ALL_DONE[:-1]
    result = await agent.resume("r", journal=journal, limits=UsageLimits(request_limit=3))
    assert result.usage.requests == 3


@dataclass
class Point:
    x: float
    tags: tuple[str, ...] = ()


@pytest.mark.parametrize(
    "value",
    [Point(1.5, ("a",)), {"n": math.nan}, [math.inf], None, "text", b"bytes", {1: 2}, {"a", "b"}],
    ids=lambda value: type(value).__name__,
)
async def test_what_a_tool_returned_reads_the_same_when_resumed(
    journal: SqliteJournal, value: Any
) -> None:
    world = World()

    def give() -> Any:
        """Give."""
        return value

    world.fails = {"model 1"}
    agent = agent_on(world, call("give", "g"), tools=[give])
    steps: list[Any] = []

    def on_event(event: AgentEvent) -> None:
        if isinstance(event, StepEnd):
            steps.append(event.result.tool_results)

    with pytest.raises(OSError, match="model 1"):
        await agent.run("Go", journal=journal, run_id="r", on_event=on_event)
    await agent.resume("r", journal=journal, on_event=on_event)
    assert steps[0] == steps[1]
    assert steps[0][0].model_text() == steps[1][0].model_text()


async def test_a_tool_that_returns_no_json_says_which(journal: SqliteJournal) -> None:
    def give() -> bytes:
        """Give."""
        return b"\xff"

    agent = agent_on(World(), call("give", "g"), tools=[give])
    with pytest.raises(JournalError, match="what tool 'give' returned in step 0 is no JSON"):
        await agent.run("Go", journal=journal, run_id="r")


async def test_complaints_of_tools_are_results_like_others(journal: SqliteJournal) -> None:
    world = World()

    def picky(n: int) -> int:
        """Picky."""
        world.do(f"picky {n}")
        if n == 0:
            raise ModelRetry("not zero")
        return n

    world.fails = {"model 2"}
    turns = (call("picky", "a", n=0), call("picky", "b", n=1))
    agent = agent_on(world, *turns, tools=[picky])
    with pytest.raises(OSError, match="model 2"):
        await agent.run("Go", journal=journal, run_id="r")
    result = await agent.resume("r", journal=journal)
    assert isinstance(result.steps[0].tool_results[0], RetryPromptPart)
    assert [what for what in world.did if what.startswith("picky")] == ["picky 0", "picky 1"]


Start = Callable[[Agent[object, Any], SqliteJournal], Any]


@pytest.mark.parametrize(
    ("start", "error", "says"),
    [
        (lambda a, j: a.resume("x", journal=j), JournalError, "run 'x': there is no such run"),
        (lambda a, j: a.run("No", journal=j, run_id="r"), JournalError, "began with the prompt"),
        (lambda a, j: a.run("Go", journal=j), UserError, "go together"),
        (lambda a, j: a.run("Go", run_id="r"), UserError, "go together"),
        (lambda a, j: a.run("Go", journal=j, run_id=""), UserError, "run_id is empty"),
    ],
    ids=["unknown", "other prompt", "no id", "no journal", "empty id"],
)
async def test_wrong_calls(
    journal: SqliteJournal, start: Start, error: type[Exception], says: str
) -> None:
    agent = agent_on(World())
    await agent.run("Go", journal=journal, run_id="r")
    with pytest.raises(error, match=says):
        await start(agent, journal)


async def test_a_run_is_written_by_one_at_a_time(journal: SqliteJournal) -> None:
    started, go_on = anyio.Event(), anyio.Event()

    async def wait() -> str:
        """Wait."""
        started.set()
        await go_on.wait()
        return "waited"

    agent = agent_on(World(), call("wait", "w"), tools=[wait])
    async with anyio.create_task_group() as group:
        group.start_soon(lambda: agent.run("Go", journal=journal, run_id="r"))
        await started.wait()
        with pytest.raises(JournalLockedError, match=r"runs\.sqlite: run 'r' is being written by"):
            await agent.resume("r", journal=journal)
        await agent_on(World()).run("Go", journal=journal, run_id="another")
        go_on.set()
    assert (await agent.resume("r", journal=journal)).output == "done"
