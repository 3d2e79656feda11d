"""Tools that run while the model is still writing: order, failures, and who has to wait."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import anyio
import pytest

from dspark_agent import (
    Agent,
    ApprovalRequired,
    DeadlineExceeded,
    DeferredToolRequests,
    Hooks,
    Model,
    ModelError,
    ModelRequest,
    ModelResponse,
    ModelTurn,
    RetryPromptPart,
    RunCancelled,
    RunContext,
    SqliteJournal,
    TextPart,
    Tool,
    ToolCallEnd,
    ToolCallPart,
    ToolResult,
    UsageLimits,
)
from dspark_agent.models.base import (
    CallChunk,
    CallEnd,
    CallStart,
    Emit,
    ModelSession,
    TextChunk,
    TranscriptSession,
)
from dspark_agent.trace import StepTrace, ToolTrace

pytestmark = pytest.mark.anyio

Stage = ToolCallPart | Callable[[], Awaitable[object]]

PAUSING: Any = str | DeferredToolRequests


class Staged(Model):
    """Writes calls one by one; between them it awaits what the test wants it to."""

    name = "staged"

    def __init__(self, *stages: Stage) -> None:
        self.stages = stages
        self.cancelled = False

    async def open(
        self, widest: ModelTurn, *, token_log: Sequence[int] | None = None
    ) -> ModelSession:
        return _StagedSession(self)


class _StagedSession(TranscriptSession):
    def __init__(self, model: Staged) -> None:
        super().__init__()
        self.model = model

    def _empty_copy(self) -> TranscriptSession:
        return _StagedSession(self.model)

    async def respond(
        self, messages: Sequence[ModelRequest | ModelResponse], turn: ModelTurn, emit: Emit
    ) -> ModelResponse:
        if any(isinstance(message, ModelResponse) for message in messages):
            await emit(TextChunk("done"))
            return ModelResponse(parts=(TextPart(content="done"),))
        calls: list[ToolCallPart] = []
        try:
            for stage in self.model.stages:
                if not isinstance(stage, ToolCallPart):
                    await stage()
                    continue
                await emit(CallStart(len(calls), stage.tool_name))
                await emit(CallChunk(len(calls), stage.args_json()))
                await emit(CallEnd(len(calls), stage))
                calls.append(stage)
        except BaseException:
            self.model.cancelled = True
            raise
        return ModelResponse(parts=tuple(calls))


def call(name: str, /, **args: Any) -> ToolCallPart:
    return ToolCallPart(tool_name=name, args=args)


async def step(model: Staged, *tools: Any, **options: Any) -> Any:
    async with Agent(model, tools=tools).session(**options) as session:
        with anyio.fail_after(5):
            return await session.step("Go", tool_choice="required")


async def test_the_first_call_runs_while_the_second_is_written() -> None:
    ran = anyio.Event()

    async def note(n: int) -> int:
        """Note."""
        if n == 1:
            ran.set()
        return n

    result = await step(Staged(call("note", n=1), ran.wait, call("note", n=2)), note)
    assert [part.content for part in result.tool_results] == [1, 2]


async def test_sync_tools_start_early_too() -> None:
    ran = threading.Event()

    def note() -> str:
        """Note."""
        ran.set()
        return "noted"

    async def wait() -> None:
        assert await anyio.to_thread.run_sync(ran.wait, 5)

    result = await step(Staged(call("note"), wait), note)
    assert result.tool_result == "noted"


async def test_results_keep_the_order_of_the_calls_and_are_told_after_the_turn() -> None:
    second = anyio.Event()
    events: list[Any] = []

    async def slow() -> str:
        """Slow."""
        await second.wait()
        return "slow"

    async def quick() -> str:
        """Quick."""
        second.set()
        return "quick"

    model = Staged(call("slow"), call("quick"), second.wait, call("quick"))
    result = await step(model, slow, quick, on_event=events.append)
    assert [part.content for part in result.tool_results] == ["slow", "quick", "quick"]
    assert [part.note is not None for part in result.tool_results] == [False, False, True]
    told = [type(e) for e in events if isinstance(e, ToolCallEnd | ToolResult)]
    assert told == [ToolCallEnd] * 3 + [ToolResult] * 3


async def test_a_sequential_tool_and_all_after_it_wait_for_the_end_of_the_turn() -> None:
    log: list[str] = []

    async def free(name: str) -> None:
        """Free."""
        log.append(name)

    async def alone() -> None:
        """Alone."""
        log.append("alone")

    async def written() -> None:
        await anyio.sleep(0.02)
        log.append("written")

    model = Staged(call("free", name="a"), call("alone"), call("free", name="b"), written)
    await step(model, free, Tool(alone, sequential=True))
    assert log == ["a", "written", "alone", "b"]


async def test_where_calls_are_limited_none_starts_before_it_is_known_that_all_may() -> None:
    log: list[str] = []

    async def note() -> None:
        """Note."""
        log.append("ran")

    async def written() -> None:
        await anyio.sleep(0.02)
        log.append("written")

    model = Staged(call("note"), written)
    await step(model, note, limits=UsageLimits(tool_calls_limit=3))
    assert log == ["written", "ran"]


@pytest.mark.parametrize("why", ["hooks", "journal", "approval"])
async def test_where_somebody_looks_first_no_call_starts_early(why: str, tmp_path: Path) -> None:
    log: list[str] = []

    async def note() -> None:
        """Note."""
        log.append("ran")

    async def written() -> None:
        await anyio.sleep(0.02)
        log.append("written")

    tool = Tool(note, requires_approval=(lambda ctx, args: False) if why == "approval" else False)
    agent = Agent(
        Staged(call("note"), written),
        tools=[tool],
        hooks=[Hooks()] if why == "hooks" else (),
        output_type=PAUSING,
    )
    with anyio.fail_after(5):
        if why == "journal":
            await agent.run("Go", journal=SqliteJournal(tmp_path / "runs.sqlite"), run_id="r")
        else:
            await agent.run("Go")
    assert log == ["written", "ran"]


async def test_observers_see_an_early_call_beside_the_turn_and_not_inside_it() -> None:
    ran = anyio.Event()
    place: ContextVar[str] = ContextVar("place", default="outside")
    seen: list[str] = []

    class Look:
        @contextmanager
        def step(self, step: StepTrace) -> Iterator[None]:
            token = place.set("step")
            yield
            place.reset(token)

        @contextmanager
        def turn(self, *args: object) -> Iterator[None]:
            token = place.set("turn")
            yield
            place.reset(token)

        @contextmanager
        def run(self, run: object) -> Iterator[None]:
            yield

        @contextmanager
        def tool(self, tool: ToolTrace) -> Iterator[None]:
            seen.append(place.get())
            yield
            assert tool.part is not None
            seen.append(str(tool.part.content))

    async def note() -> str:
        """Note."""
        ran.set()
        return "noted"

    agent = Agent(Staged(call("note"), ran.wait), tools=[note])
    agent.instrument(Look())
    async with agent.session() as session:
        with anyio.fail_after(5):
            result = await session.step("Go", tool_choice="required")
    assert seen == ["step", "noted"]
    assert result.trace is not None
    assert [tool.part for tool in result.trace.tools] == list(result.tool_results)


async def test_a_fork_in_an_early_call_waits_until_the_turn_is_written() -> None:
    log: list[str] = []
    asked = anyio.Event()

    async def aside(ctx: RunContext[Any]) -> str:
        """Think aside."""
        asked.set()
        async with await ctx.fork() as fork:
            log.append("forked")
            return f"{len(fork.messages)} messages"

    async def written() -> None:
        await asked.wait()
        await anyio.sleep(0.02)
        log.append("written")

    result = await step(Staged(call("aside"), written), aside)
    assert log == ["written", "forked"]
    assert result.tool_result == "1 messages"


async def test_a_call_that_asks_for_approval_while_it_runs_early_pauses_the_run() -> None:
    async def drop() -> None:
        """Drop."""
        raise ApprovalRequired

    async def note() -> str:
        """Note."""
        return "noted"

    agent = Agent(
        Staged(call("drop"), lambda: anyio.sleep(0.01), call("note")),
        tools=[drop, note],
        output_type=PAUSING,
    )
    with anyio.fail_after(5):
        result = await agent.run("Go")
    assert isinstance(result.output, DeferredToolRequests)
    assert result.usage.tool_calls == 1


async def test_a_tool_sees_what_the_model_has_said_so_far() -> None:
    seen: list[Any] = []
    ran = anyio.Event()

    async def look(ctx: RunContext[Any]) -> None:
        """Look."""
        seen.append(ctx.messages)
        ran.set()

    first, second = call("look"), call("missing")
    result = await step(Staged(first, ran.wait, second), look)
    (messages,) = seen
    assert [type(message) for message in messages] == [ModelRequest, ModelResponse]
    assert messages[-1].tool_calls == [first]
    assert isinstance(result.tool_results[1], RetryPromptPart)


async def test_a_tool_that_breaks_while_the_turn_streams_stops_it_and_undoes_the_step() -> None:
    async def breaks() -> None:
        """Break."""
        raise ZeroDivisionError("a bug in the tool")

    model = Staged(call("breaks"), anyio.sleep_forever)
    async with Agent(model, tools=[breaks]).session() as session:
        with anyio.fail_after(5), pytest.raises(ZeroDivisionError, match="a bug in the tool"):
            await session.step("Go")
        assert session.messages == ()
    assert model.cancelled


async def test_a_model_that_breaks_stops_the_tools_and_comes_out_as_it_is() -> None:
    started, stopped = anyio.Event(), anyio.Event()

    async def waits() -> None:
        """Wait."""
        started.set()
        try:
            await anyio.sleep_forever()
        finally:
            stopped.set()

    async def fail() -> None:
        await started.wait()
        raise ModelError("the server went away")

    with pytest.raises(ModelError, match="went away"):
        await step(Staged(call("waits"), fail), waits)
    assert stopped.is_set()


@pytest.mark.parametrize("how", ["parent", "deadline", "tool"])
async def test_cancelling_reaches_the_model_and_the_running_tool(how: str) -> None:
    started, stopped = anyio.Event(), anyio.Event()

    async def waits(ctx: RunContext[Any]) -> None:
        """Wait."""
        started.set()
        if how == "tool":
            ctx.cancel("enough")
        try:
            await anyio.sleep_forever()
        finally:
            stopped.set()

    model = Staged(call("waits"), anyio.sleep_forever)
    limits = UsageLimits(wall_seconds=0.05 if how == "deadline" else None)
    async with Agent(model, tools=[waits]).session() as session:
        with anyio.CancelScope() as parent:

            async def cancel() -> None:
                await started.wait()
                if how == "parent":
                    parent.cancel()

            async with anyio.create_task_group() as group:
                group.start_soon(cancel)
                expected: dict[str, type[Exception] | tuple[()]] = {
                    "parent": (),
                    "deadline": DeadlineExceeded,
                    "tool": RunCancelled,
                }
                try:
                    await session.step("Go", limits=limits)
                except expected[how]:
                    pass
        assert parent.cancelled_caught == (how == "parent")
        assert session.messages == ()
        assert model.cancelled
        assert stopped.is_set()


async def test_what_a_listener_raises_stops_the_early_calls() -> None:
    stopped = anyio.Event()

    async def waits() -> None:
        """Wait."""
        try:
            await anyio.sleep_forever()
        finally:
            stopped.set()

    async def listen(event: object) -> None:
        if isinstance(event, ToolCallEnd):
            await anyio.sleep(0.01)
            raise OSError("no terminal")

    with pytest.raises(OSError, match="no terminal"):
        await step(Staged(call("waits")), waits, on_event=listen)
    assert stopped.is_set()
