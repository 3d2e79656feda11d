"""One cancellation and one deadline, from the run down to the tools; the session stays usable."""

from __future__ import annotations

import threading
import time

import anyio
import pytest

from dspark_agent import (
    Agent,
    DeadlineExceeded,
    FunctionModel,
    ModelMessage,
    ModelTurn,
    RunCancelled,
    RunContext,
    TestModel,
    ToolCallPart,
    UsageLimits,
)

pytestmark = pytest.mark.anyio


class Slow:
    """A model that sleeps as long as it is told to, and notices being cancelled."""

    def __init__(self) -> None:
        self.seconds = 60.0
        self.cancelled = 0
        self.model = FunctionModel(self.answer)

    async def answer(self, messages: list[ModelMessage], turn: ModelTurn) -> str:
        try:
            await anyio.sleep(self.seconds)
        except BaseException:
            self.cancelled += 1
            raise
        return "done"


async def test_a_cancelled_step_leaves_the_session_as_it_was() -> None:
    slow = Slow()
    async with Agent(slow.model).session() as session:
        with anyio.move_on_after(0.02) as scope:
            await session.step("Go")
        assert scope.cancelled_caught
        assert slow.cancelled == 1
        assert session.messages == ()
        slow.seconds = 0
        assert (await session.step("Go")).output == "done"
        assert len(session.messages) == 2


async def test_a_run_past_its_deadline_says_so() -> None:
    slow = Slow()
    with pytest.raises(DeadlineExceeded, match=r"wall_seconds=0\.02"):
        await Agent(slow.model).run("Go", limits=UsageLimits(wall_seconds=0.02))
    assert slow.cancelled == 1


async def test_a_steps_deadline_is_the_steps_own() -> None:
    slow = Slow()
    async with Agent(slow.model).session() as session:
        with pytest.raises(DeadlineExceeded):
            await session.step("Go", limits=UsageLimits(wall_seconds=0.02))
        slow.seconds = 0
        assert (await session.step("Go")).output == "done"


async def test_a_sessions_deadline_holds_over_its_steps() -> None:
    slow = Slow()
    slow.seconds = 0.03
    async with Agent(slow.model).session(limits=UsageLimits(wall_seconds=0.05)) as session:
        await session.step("One")
        with pytest.raises(DeadlineExceeded) as caught:
            await session.step("Two", limits=UsageLimits(wall_seconds=10))
    assert caught.value.seconds == 0.05


async def test_a_tool_knows_the_deadline_and_is_cancelled_by_it() -> None:
    remaining: list[float] = []
    stopped = False

    async def wait(ctx: RunContext[object]) -> None:
        """Wait."""
        nonlocal stopped
        remaining.append(ctx.remaining_s)
        try:
            await anyio.sleep(60)
        finally:
            stopped = True

    agent = Agent(TestModel(), tools=[wait])
    with pytest.raises(DeadlineExceeded):
        await agent.run("Go", limits=UsageLimits(wall_seconds=0.1))
    assert 0 < remaining[0] <= 0.1
    assert stopped


async def test_without_limits_there_is_no_deadline() -> None:
    async def look(ctx: RunContext[object]) -> bool:
        """Look."""
        return ctx.remaining_s == float("inf")

    async with Agent(TestModel(), tools=[look]).session() as session:
        assert (await session.step("Go", tool_choice="look")).tool_result is True


async def test_a_tool_cancels_the_run_and_every_other_call() -> None:
    stopped = False

    async def waits() -> None:
        """Wait."""
        nonlocal stopped
        try:
            await anyio.sleep(60)
        finally:
            stopped = True

    async def stop(ctx: RunContext[object]) -> None:
        """Stop."""
        await anyio.sleep(0.01)
        ctx.cancel("seen enough")
        assert ctx.cancelled
        await anyio.sleep(60)

    agent = Agent(TestModel(), tools=[waits, stop])
    with pytest.raises(RunCancelled, match="seen enough") as caught:
        await agent.run("Go")
    assert caught.value.reason == "seen enough"
    assert stopped


async def test_a_sync_tool_cancels_from_its_thread_and_others_notice() -> None:
    working, noticed = threading.Event(), threading.Event()

    def stop(ctx: RunContext[object]) -> None:
        """Stop."""
        working.wait(5)
        ctx.cancel("enough")

    def works(ctx: RunContext[object]) -> None:
        """Work."""
        working.set()
        try:
            for _ in range(500):
                ctx.check_cancelled()
                time.sleep(0.01)
        except BaseException:
            noticed.set()
            raise

    agent = Agent(TestModel(), tools=[works, stop])
    with pytest.raises(RunCancelled, match="enough"):
        await agent.run("Go")
    assert await anyio.to_thread.run_sync(noticed.wait, 5)


async def test_a_cancelled_session_step_can_be_taken_again() -> None:
    calls = 0

    async def stop_once(ctx: RunContext[object]) -> str:
        """Stop once."""
        nonlocal calls
        calls += 1
        if calls == 1:
            ctx.cancel("not now")
        await anyio.sleep(0)
        return "done"

    agent = Agent(
        FunctionModel(lambda messages, turn: ToolCallPart(tool_name="stop_once")), tools=[stop_once]
    )
    async with agent.session() as session:
        with pytest.raises(RunCancelled, match="not now"):
            await session.step("Go", tool_choice="stop_once")
        assert session.messages == ()
        assert (await session.step("Go", tool_choice="stop_once")).tool_result == "done"


async def test_a_failing_turn_of_a_run_keeps_the_turns_before_it() -> None:
    def answer(messages: list[ModelMessage], turn: ModelTurn) -> ToolCallPart:
        return ToolCallPart(tool_name="work", args={"n": len(messages)})

    def work(n: int) -> int:
        """Work."""
        return n

    async with Agent(FunctionModel(answer), tools=[work]).session() as session:
        with pytest.raises(Exception, match="request_limit of 2"):
            await session.run("Go", limits=UsageLimits(request_limit=2))
        assert len(session.steps) == 2
        kinds = [part.part_kind for message in session.messages for part in message.parts]
        assert kinds == ["user-prompt", "tool-call", "tool-return", "tool-call", "tool-return"]
