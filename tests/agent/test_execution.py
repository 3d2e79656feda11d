"""Tool calls of one step: parallel, timed, checked, and their failures told apart."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import anyio
import pytest

from dspark_agent import (
    ModelRetry,
    RetryPromptPart,
    RunContext,
    RunUsage,
    Tool,
    ToolCallPart,
    ToolFailed,
    ToolRetriesExceeded,
    ToolReturnPart,
)
from dspark_agent.execution import RetryCount, ToolPart, ToolRunner

pytestmark = pytest.mark.anyio


def call(name: str, /, **args: Any) -> ToolCallPart:
    return ToolCallPart(tool_name=name, args=args)


async def run(
    functions: Sequence[Tool[Any] | Callable[..., Any]],
    *calls: ToolCallPart,
    offered: Sequence[str] | None = None,
    count: RetryCount | None = None,
    timeout: float | None = None,
    retries: int = 1,
) -> list[ToolPart]:
    tools = {t.name: t for t in (f if isinstance(f, Tool) else Tool(f) for f in functions)}
    runner: ToolRunner[Any] = ToolRunner(tools, retries=retries, timeout=timeout)

    async def ignore(index: int, part: ToolPart, seconds: float) -> None:
        assert seconds >= 0

    return await runner.run(
        calls,
        offered={n: t.definition for n, t in tools.items() if offered is None or n in offered},
        ctx=RunContext(deps="deps", messages=(), usage=RunUsage()),
        count=count or RetryCount(),
        on_result=ignore,
    )


async def test_calls_run_at_the_same_time_and_answer_in_order() -> None:
    both = anyio.Event()
    arrived: list[str] = []

    async def meet(name: str) -> str:
        """Meet."""
        arrived.append(name)
        if len(arrived) == 2:
            both.set()
        await both.wait()
        return name

    with anyio.fail_after(5):
        parts = await run([meet], call("meet", name="a"), call("meet", name="b"))
    assert [part.content for part in parts] == ["a", "b"]


async def test_sync_functions_run_at_the_same_time_too() -> None:
    barrier = threading.Barrier(2, timeout=5)

    def meet() -> int:
        """Meet."""
        return barrier.wait()

    parts = await run([meet], call("meet"), call("meet"))
    assert sorted(part.content for part in parts) == [0, 1]


async def test_sequential_tools_have_the_stage_for_themselves() -> None:
    running = 0

    async def alone(n: int) -> int:
        """Alone."""
        nonlocal running
        running += 1
        await anyio.sleep(0.01)
        assert running == 1
        running -= 1
        return n

    parts = await run([Tool(alone, sequential=True)], *[call("alone", n=n) for n in range(3)])
    assert [part.content for part in parts] == [0, 1, 2]


async def test_the_context_says_which_call_it_is_and_how_often_it_was_refused() -> None:
    def who(ctx: RunContext[str]) -> str:
        """Who."""
        return f"{ctx.deps} {ctx.tool_name} {ctx.tool_call_id} {ctx.retry}/{ctx.max_retries}"

    made = ToolCallPart(tool_name="who", tool_call_id="c7")
    parts = await run([Tool(who, retries=4)], made, count=RetryCount({"who": 2}))
    assert parts[0].content == "deps who c7 2/4"


async def test_bad_arguments_come_back_as_a_reason_to_try_again() -> None:
    def add(a: int) -> int:
        """Add."""
        return a

    parts = await run([add], call("add", a="many"), ToolCallPart(tool_name="add", args="{broken"))
    for part, says in zip(
        parts, ("a: Input should be a valid integer", "Invalid JSON"), strict=True
    ):
        assert isinstance(part, RetryPromptPart)
        assert says in part.content


@pytest.mark.parametrize("name", ["unknown", "hidden"])
async def test_a_tool_that_is_not_offered_is_refused_and_not_run(name: str) -> None:
    def hidden() -> None:
        """Hidden."""
        raise AssertionError

    def open_one() -> None:
        """Open."""

    (part,) = await run([hidden, open_one], call(name), offered=["open_one"])
    assert isinstance(part, RetryPromptPart)
    assert name in part.content
    assert "open_one" in part.content


async def test_a_retry_counts_and_a_failure_does_not() -> None:
    def picky(n: int) -> int:
        """Picky."""
        if n == 0:
            raise ModelRetry("more than zero")
        if n == 1:
            raise ToolFailed("one is broken")
        return n

    count = RetryCount()
    (refused,) = await run([picky], call("picky", n=0), count=count)
    assert isinstance(refused, RetryPromptPart)
    assert refused.content == "more than zero"
    assert count.by_tool == {"picky": 1}
    (failed,) = await run([picky], call("picky", n=1), count=count)
    assert isinstance(failed, ToolReturnPart)
    assert failed.outcome == "failed"
    assert count.by_tool == {}


async def test_retries_in_a_row_are_limited() -> None:
    def never() -> None:
        """Never."""
        raise ModelRetry("not like this")

    count = RetryCount()
    await run([Tool(never, retries=2)], call("never"), count=count)
    await run([Tool(never, retries=2)], call("never"), count=count)
    with pytest.raises(ToolRetriesExceeded, match="not like this") as caught:
        await run([Tool(never, retries=2)], call("never"), count=count)
    assert caught.value.tool_name == "never"


async def test_several_refusals_in_one_step_count_once() -> None:
    def never() -> None:
        """Never."""
        raise ModelRetry("no")

    count = RetryCount()
    await run([never], call("never"), call("never"), count=count)
    assert count.by_tool == {"never": 1}


@pytest.mark.parametrize(("own", "agents"), [(None, 0.05), (0.05, 60)])
async def test_a_call_past_its_timeout_is_stopped(own: float | None, agents: float) -> None:
    stopped = False

    async def slow() -> None:
        """Slow."""
        nonlocal stopped
        try:
            await anyio.sleep(60)
        finally:
            stopped = True

    (part,) = await run(
        [Tool(slow, timeout=own)], call("slow"), timeout=0.05 if own is None else 60
    )
    assert isinstance(part, RetryPromptPart)
    assert "longer than 0.05 s" in part.content
    assert stopped


async def test_a_sync_call_past_its_timeout_is_left_behind_and_can_notice() -> None:
    noticed = threading.Event()

    def slow(ctx: RunContext[str]) -> None:
        """Slow."""
        try:
            for _ in range(500):
                ctx.check_cancelled()
                time.sleep(0.01)
        except BaseException:
            noticed.set()
            raise

    (part,) = await run([Tool(slow, timeout=0.05)], call("slow"))
    assert isinstance(part, RetryPromptPart)
    assert await anyio.to_thread.run_sync(noticed.wait, 5)


async def test_any_other_exception_comes_out_bare_and_stops_the_other_calls() -> None:
    stopped = False

    async def waits() -> None:
        """Waits."""
        nonlocal stopped
        try:
            await anyio.sleep(60)
        finally:
            stopped = True

    async def breaks() -> None:
        """Breaks."""
        await anyio.sleep(0.01)
        raise ZeroDivisionError("a bug in the tool")

    with pytest.raises(ZeroDivisionError, match="a bug in the tool"):
        await run([waits, breaks], call("waits"), call("breaks"))
    assert stopped
