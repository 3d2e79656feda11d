"""Many runs at once, with random cancellations and faults: every one ends in a result or in an
error that says what happened, and nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import resource
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import anyio
import pytest
from pydantic import BaseModel

from dspark_agent import (
    Agent,
    AgentRun,
    DeferredToolRequests,
    DeferredToolResults,
    DSparkError,
    EventStream,
    FunctionModel,
    ModelError,
    ModelMessage,
    ModelResponse,
    ModelRetry,
    ModelTurn,
    RunContext,
    SqliteJournal,
    Tool,
    ToolCallPart,
    ToolFailed,
    UsageLimits,
)
from dspark_agent.core import Core
from dspark_agent.journal.record import RunRecord

RUNS = 500
EXPECTED = {"result", "cancelled", "ModelError", "OutputError", "RunCancelled"}
GRACE = 60.0  # seconds
LIMITS = UsageLimits(request_limit=6, tool_calls_limit=9, wall_seconds=3.0)


class Answer(BaseModel):
    text: str
    size: int


class Chaos:
    """A model and tools that do what they should most of the time."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    async def answer(self, messages: list[ModelMessage], turn: ModelTurn) -> Any:
        await anyio.sleep(self.random.expovariate(1 / 0.003))
        luck = self.random.random()
        if luck < 0.03:
            raise ModelError("the server is away")
        if luck < 0.1:
            return "no JSON at all"
        turns = sum(isinstance(message, ModelResponse) for message in messages)
        if turns > self.random.randrange(6):
            return '{"text": "done", "size": 3}'
        names = self.random.choices(["fast", "slow", "thread", "guarded", "nosuch"], k=3)
        return [
            ToolCallPart(tool_name=name, args={"n": self.random.choice([1, 2, "x"])})
            for name in names[: self.random.randint(1, 3)]
        ]

    async def fast(self, n: int) -> list[int]:
        """Fast."""
        return [n] * 5

    async def slow(self, ctx: RunContext[object], n: int) -> str:
        """Slow."""
        await anyio.sleep(self.random.expovariate(1 / 0.02))
        luck = self.random.random()
        if luck < 0.05:
            raise ModelRetry("once more")
        if luck < 0.1:
            raise ToolFailed("no")
        if luck < 0.13:
            ctx.cancel("enough")
        return "x" * n

    def thread(self, ctx: RunContext[object], n: int) -> int:
        """Thread."""
        for _ in range(self.random.randrange(3)):
            time.sleep(0.001)
            ctx.check_cancelled()
        return n

    def guarded(self, n: int) -> int:
        """Guarded."""
        return n

    def agent(self) -> Agent[object, Any]:
        output_type: Any = Answer | DeferredToolRequests
        return Agent(
            FunctionModel(self.answer),
            output_type=output_type,
            tools=[self.fast, self.slow, self.thread, Tool(self.guarded, requires_approval=True)],
            tool_timeout=0.1,
            limits=LIMITS,
        )


async def one_run(chaos: Chaos, agent: Agent[object, Any], journal: Any, run_id: str) -> str:
    """One run, paused and resumed as it comes, perhaps cancelled; what it came to."""
    options: dict[str, Any] = {}
    if chaos.random.random() < 0.02:  # a disk's write takes longer than all else here
        options = {"journal": journal, "run_id": run_id}
    patience = chaos.random.choice([0.02, 0.5, 10.0, 10.0])
    ended = "cancelled"
    with anyio.move_on_after(patience):
        try:
            if chaos.random.random() < 0.3:
                async with agent.run_stream("Go", **options) as stream:
                    async for _ in stream:
                        if chaos.random.random() < 0.02:
                            return "left"
                    result = await stream.result()
            else:
                result = await agent.run("Go", **options)
            while isinstance(result.output, DeferredToolRequests):
                decided = {
                    call.tool_call_id: chaos.random.random() < 0.5
                    for call in result.output.approvals
                }
                results = DeferredToolResults(approvals=decided)
                if options:
                    result = await agent.resume(
                        run_id, journal=journal, deferred_tool_results=results
                    )
                else:
                    result = await agent.run(
                        message_history=result.history, deferred_tool_results=results
                    )
            assert isinstance(result.output, Answer)
            ended = "result"
        except DSparkError as error:
            ended = type(error).__name__ if str(error) else "an error without words"
    return ended


async def soak(chaos: Chaos, seconds: float, folder: Path) -> tuple[Counter[str], list[int]]:
    """Keep 500 runs going; what they came to, and the process's memory after each quarter."""
    agent, ended = chaos.agent(), Counter[str]()
    journal = SqliteJournal(folder / "runs.sqlite")
    numbers = iter(range(sys.maxsize))
    stop_at = time.monotonic() + seconds

    def over() -> bool:
        # How many runs some seconds are enough for is the machine's affair: go on, in bounds, until
        # every kind of end was seen.
        late = time.monotonic() - stop_at
        return late >= 0 and (set(ended) >= EXPECTED or late >= GRACE)

    async def keep_going() -> None:
        while not over():
            ended[await one_run(chaos, agent, journal, str(next(numbers)))] += 1

    memory: list[int] = []
    async with anyio.create_task_group() as group:
        for _ in range(RUNS):
            group.start_soon(keep_going)
        for _ in range(4):
            await anyio.sleep(seconds / 4)
            memory.append(memory_bytes())
    return ended, memory


def open_files() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def memory_bytes() -> int:
    """Resident memory of this process."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def objects() -> Counter[str]:
    """Living objects that belong to one run."""
    gc.collect()
    kinds = (AgentRun, Core, RunRecord, ToolCallPart, EventStream)
    return Counter(type(each).__name__ for each in gc.get_objects() if type(each) in kinds)


async def check(seconds: float, folder: Path) -> None:
    chaos = Chaos(seed=1)
    await soak(chaos, 1.0, folder)  # fills caches, pools of threads and of memory
    tasks, files, living = len(asyncio.all_tasks()), open_files(), objects()
    ended, memory = await soak(chaos, seconds, folder)
    assert len(asyncio.all_tasks()) == tasks
    assert open_files() == files
    assert objects() == living
    assert memory_bytes() <= 1.05 * max(memory[:2]), memory
    known = {"result", "left", "cancelled", "RunCancelled", "ModelError", "OutputError",
             "ToolRetriesExceeded", "UsageLimitExceeded", "DeadlineExceeded"}  # fmt: skip
    assert set(ended) <= known, ended
    assert set(ended) >= EXPECTED, ended
    assert sum(ended.values()) >= RUNS
    assert not list(folder.glob("*.lock"))


@pytest.mark.parametrize(
    "seconds", [3, pytest.param(60, marks=pytest.mark.slow)], ids=["short", "whole"]
)
def test_a_crowd_of_runs_leaves_nothing_behind(seconds: float, tmp_path: Path) -> None:
    asyncio.run(check(seconds, tmp_path))
