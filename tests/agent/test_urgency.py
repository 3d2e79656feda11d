"""Urgency and deadlines on their way from a run to its turns, and to the agents its tools run."""

from __future__ import annotations

import math
from typing import Any

import anyio
import pytest

from dspark_agent import (
    Agent,
    FunctionModel,
    ModelMessage,
    ModelTurn,
    ToolCallPart,
    UsageLimits,
    UserError,
)
from dspark_agent.urgency import Standing, Urgency, standing, waited_for


class Recorder:
    """A model that calls ``tool`` once, if there is one, and keeps the turns it was given."""

    def __init__(self) -> None:
        self.turns: list[ModelTurn] = []
        self.model = FunctionModel(self.answer)

    def answer(self, messages: list[ModelMessage], turn: ModelTurn) -> Any:
        self.turns.append(turn)
        if turn.tools and len(messages) == 1:
            return ToolCallPart(tool_name=turn.tools[0].name)
        return "done"

    @property
    def urgencies(self) -> list[Urgency]:
        return [turn.urgency for turn in self.turns]


@pytest.mark.parametrize(
    ("own", "parent", "expected"),
    [
        (None, None, "interactive"),
        ("background", None, "background"),
        (None, "critical", "critical"),
        (None, "background", "background"),
        ("background", "critical", "critical"),
        ("critical", "background", "critical"),
        ("interactive", "background", "interactive"),
    ],
)
def test_work_is_as_urgent_as_who_waits_for_it(
    own: Urgency | None, parent: Urgency | None, expected: Urgency
) -> None:
    if parent is None:
        assert standing(own, math.inf) == Standing(expected)
        return
    with waited_for(Standing(parent)):
        assert standing(own, math.inf).urgency == expected
    assert standing(None, math.inf).urgency == "interactive"


def test_the_tighter_deadline_holds() -> None:
    with waited_for(standing(None, 5.0)):
        assert 4.0 < (standing(None, 60.0).deadline_s or 0.0) <= 5.0
        assert 0.0 < (standing(None, 1.0).deadline_s or 0.0) <= 1.0
        assert standing(None, -1.0).deadline_s == 0.0
    assert standing(None, math.inf).deadline_s is None


def test_an_unknown_urgency_is_named() -> None:
    with pytest.raises(UserError, match="'urgent' is not known; there are critical"):
        standing("urgent", math.inf)  # type: ignore[arg-type]


@pytest.mark.anyio
async def test_settings_and_limits_reach_the_models_turn() -> None:
    heard = Recorder()
    agent = Agent(heard.model, model_settings={"urgency": "background"})
    async with agent.session(limits=UsageLimits(wall_seconds=30)) as session:
        await session.step("Go", limits=UsageLimits(wall_seconds=5))
        await session.step("Go", settings={"urgency": "critical"})
    await agent.run("Go")
    assert heard.urgencies == ["background", "critical", "background"]
    first, second, third = (turn.deadline_s for turn in heard.turns)
    assert first is not None
    assert second is not None
    assert first <= 5.0 < second <= 30.0
    assert third is None


@pytest.mark.anyio
@pytest.mark.parametrize("in_thread", [False, True], ids=["async", "sync"])
async def test_an_agent_that_a_tool_runs_inherits_from_its_parent(in_thread: bool) -> None:
    parent, child = Recorder(), Recorder()
    sub = Agent(child.model, model_settings={"urgency": "background"})

    async def ask() -> str:
        """Ask."""
        return (await sub.run("Help", limits=UsageLimits(wall_seconds=60))).output

    def ask_in_thread() -> str:
        """Ask."""
        return sub.run_sync("Help", limits=UsageLimits(wall_seconds=60)).output

    agent = Agent(
        parent.model,
        tools=[ask_in_thread if in_thread else ask],
        model_settings={"urgency": "critical"},
    )
    await agent.run("Go", limits=UsageLimits(wall_seconds=10))
    await sub.run("Alone")
    assert parent.urgencies == ["critical", "critical"]
    assert child.urgencies == ["critical", "background"]
    inherited, alone = (turn.deadline_s for turn in child.turns)
    assert inherited is not None
    assert 5.0 < inherited <= 10.0
    assert alone is None


@pytest.mark.anyio
async def test_runs_side_by_side_do_not_inherit_from_each_other() -> None:
    heard = Recorder()
    agent = Agent(heard.model)

    async def run(urgency: Urgency) -> None:
        await agent.run("Go", model_settings={"urgency": urgency})

    async with anyio.create_task_group() as group:
        for urgency in ("critical", "background"):
            group.start_soon(run, urgency)
    assert sorted(heard.urgencies) == ["background", "critical"]
