"""Several agents in runs that are recorded, or that wait for an approval."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dspark_agent import (
    Agent,
    DeferredToolRequests,
    FunctionModel,
    Handoff,
    ModelMessage,
    ModelTurn,
    RunContext,
    SqliteJournal,
    TestModel,
    Tool,
    ToolCallPart,
    UserError,
)
from dspark_agent.trace import RunTrace, StepTrace, ToolTrace

pytestmark = pytest.mark.anyio


class Counted:
    """A model that calls its first tool, then answers; it counts its turns, and fails at some."""

    def __init__(self, *failing: int, **args: Any) -> None:
        self.turns = 0
        self.failing = failing
        self.args = args
        self.heard: list[list[ModelMessage]] = []
        self.model = FunctionModel(self.answer)

    def answer(self, messages: list[ModelMessage], turn: ModelTurn) -> Any:
        self.turns += 1
        self.heard.append(messages)
        if self.turns in self.failing:
            raise OSError("gone")
        if turn.tools and messages[-1].parts[-1].part_kind == "user-prompt":
            return ToolCallPart(tool_name=turn.tools[0].name, args=self.args)
        return "done"


async def test_a_part_that_is_recorded_is_not_run_again(tmp_path: Path) -> None:
    sub = Counted()
    boss = Counted(2, prompt="Go")
    helper = Agent(sub.model, name="helper")
    agent = Agent(boss.model, tools=[helper.as_tool(description="Ask.")])
    journal = SqliteJournal(tmp_path / "runs.db")
    with pytest.raises(OSError, match="gone"):
        await agent.run("Go", journal=journal, run_id="one")
    result = await agent.run("Go", journal=journal, run_id="one")
    assert result.output == "done"
    assert sub.turns == 1
    assert boss.turns == 3


@pytest.mark.parametrize("fails", [False, True])
async def test_a_fork_in_a_recorded_run_starts_before_its_step(tmp_path: Path, fails: bool) -> None:
    boss = Counted()
    broken = fails

    async def consider(ctx: RunContext[object]) -> str:
        """Consider."""
        nonlocal broken
        if broken:
            broken = False
            raise OSError("gone")
        async with await ctx.fork() as fork:
            return str((await fork.step("Consider it.", tools=[])).output)

    tool = Tool(consider, idempotent=True)  # so that it is run again, not in doubt
    agent = Agent(boss.model, instructions="Be brief.", tools=[tool])
    journal = SqliteJournal(tmp_path / "runs.db")
    if fails:
        with pytest.raises(OSError, match="gone"):
            await agent.run("Go", journal=journal, run_id="one")
    result = await agent.run("Go", journal=journal, run_id="one")
    assert result.output == "done"
    assert boss.turns == 3
    assert [part.content for part in boss.heard[1][0].parts] == [  # type: ignore[union-attr]
        "Be brief.",
        "Go",
        "Consider it.",
    ]
    assert len(boss.heard[1]) == 1


async def test_a_part_cannot_wait_for_an_approval() -> None:
    def delete() -> None:
        """Delete."""
        raise AssertionError("not approved")

    helper: Agent[object, Any] = Agent(
        Counted().model,
        name="helper",
        tools=[Tool(delete, requires_approval=True)],
        output_type=str | DeferredToolRequests,
    )
    agent = Agent(Counted(prompt="Go").model, tools=[helper.as_tool(description="Ask.")])
    with pytest.raises(UserError, match="'helper' waits for an approval"):
        await agent.run("Go")


async def test_who_watches_an_agent_sees_what_its_successor_does() -> None:
    seen: list[tuple[str, int, str]] = []

    class Looks:
        @contextmanager
        def run(self, run: RunTrace) -> Iterator[None]:
            yield

        @contextmanager
        def step(self, step: StepTrace) -> Iterator[None]:
            seen.append((step.agent, step.index, step.conversation_id))
            yield

        @contextmanager
        def turn(self, step: StepTrace, messages: object, turn: ModelTurn) -> Iterator[None]:
            yield

        @contextmanager
        def tool(self, tool: ToolTrace) -> Iterator[None]:
            yield

    other = Agent(TestModel(), name="other")
    triage = Agent(Counted(reason="theirs").model, name="triage", tools=[Handoff(other)])
    await triage.instrument(Looks()).run("Go")
    assert [(agent, index) for agent, index, _ in seen] == [("triage", 0), ("other", 1)]
    assert len({conversation for *_, conversation in seen}) == 1
