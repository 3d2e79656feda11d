"""What a run took when, as a value: nested agents, failures, and content only where asked for."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path

import anyio
import pytest

from dspark_agent import (
    Agent,
    DSparkError,
    FunctionModel,
    ModelTurn,
    Recording,
    TestModel,
    Timeline,
    ToolCallPart,
    UsageLimits,
    UserError,
)
from dspark_agent.models.testing import Messages


def calls_then_answers(*calls: ToolCallPart) -> FunctionModel:
    """Makes all the calls in its first turn, and answers in its second."""

    def answer(messages: Messages, turn: ModelTurn) -> list[ToolCallPart] | str:
        return list(calls) if len(messages) == 1 else "secret answer"

    return FunctionModel(answer, model_name="fake")


async def nap(seconds: float) -> str:
    """Sleep.

    Args:
        seconds: how long.
    """
    await anyio.sleep(seconds)
    return "secret result"


def test_steps_and_tools_lie_where_they_were() -> None:
    naps = [ToolCallPart(tool_name="nap", args={"seconds": s}) for s in (0.03, 0.06)]
    before = datetime.now(tz=UTC)
    result = Agent(calls_then_answers(*naps), tools=[nap], name="sleeper").run_sync("go")
    timeline = result.timeline()

    first, second = timeline.steps
    assert before <= timeline.started_at <= datetime.now(tz=UTC)
    assert (first.begin_s, first.agent, first.model) == (0.0, "sleeper", "fake")
    assert first.end_s <= second.begin_s < second.end_s == timeline.total_s
    assert first.model_end_s is not None
    for tool, seconds in zip(first.tools, (0.03, 0.06), strict=True):
        assert first.model_end_s <= tool.begin_s < tool.end_s <= first.end_s
        assert tool.end_s - tool.begin_s >= seconds
        assert tool.outcome == "success"
    one, two = first.tools
    assert two.begin_s < one.end_s, "they ran at the same time"
    assert first.metrics == result.steps[0].metrics
    assert first.end_s == pytest.approx(first.metrics.total_s, abs=0.01)
    assert second.usage.output_tokens == 2


def test_content_is_there_only_where_it_was_asked_for() -> None:
    call = ToolCallPart(tool_name="nap", args={"seconds": 0.0})
    result = Agent(calls_then_answers(call), tools=[nap]).run_sync("secret prompt")

    assert "secret" not in result.timeline().model_dump_json()
    (tool,) = result.timeline(content=True).steps[0].tools
    assert (tool.arguments, tool.result) == ('{"seconds": 0.0}', "secret result")
    assert result.timeline(content=True).steps[1].text == "secret answer"


def test_a_timeline_is_read_as_it_was_written(tmp_path: Path) -> None:
    timeline = Agent(TestModel(), tools=[nap]).run_sync("go").timeline(content=True)
    timeline.write(tmp_path / "run.json")
    assert Timeline.read(tmp_path / "run.json") == timeline


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("no", "the file: Invalid JSON"),
        ('{"started_at": "2026-01-01T00:00:00Z", "steps": [{"agent": 3}]}', "steps.0.agent"),
        ('{"version": 2, "started_at": "2026-01-01T00:00:00Z", "steps": []}', "version"),
        ('{"started_at": "2026-01-01T00:00:00Z", "steps": []}', "has no steps"),
    ],
)
def test_a_file_that_is_no_timeline_is_named_with_the_place(
    tmp_path: Path, text: str, complaint: str
) -> None:
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(UserError, match=complaint) as raised:
        Timeline.read(path)
    assert str(path) in str(raised.value)


@pytest.mark.anyio
async def test_agents_inside_a_tool_are_steps_of_their_own() -> None:
    helper = Agent(TestModel(custom_output_text="helped"), name="helper")

    async def ask() -> str:
        """Ask the helper."""
        async with helper.session() as session:
            return (await session.step("help")).output

    call = ToolCallPart(tool_name="ask")
    result = await Agent(calls_then_answers(call), tools=[ask], name="boss").run("go")
    timeline = result.timeline()

    assert [(step.agent, step.parent) for step in timeline.steps] == [
        ("boss", None),
        ("helper", 0),
        ("boss", None),
    ]
    outer, inner, _ = timeline.steps
    assert outer.tools[0].begin_s <= inner.begin_s <= inner.end_s <= outer.tools[0].end_s
    assert [agent for agent, _ in timeline.lanes] == ["boss", "helper"]


def test_a_synchronous_run_inside_a_threaded_tool_is_nested_too() -> None:
    helper = Agent(TestModel(custom_output_text="helped"), name="helper")

    def ask() -> str:
        """Ask the helper."""
        return helper.run_sync("help").output

    call = ToolCallPart(tool_name="ask")
    timeline = Agent(calls_then_answers(call), tools=[ask]).run_sync("go").timeline()
    assert [step.parent for step in timeline.steps] == [None, 0, None]


@pytest.mark.anyio
async def test_a_recording_has_parallel_agents_forks_and_failures() -> None:
    agent = Agent(TestModel(custom_output_text="fine"), name="a")
    broken = Agent(FunctionModel(lambda *_: object()), name="broken")  # type: ignore[arg-type,return-value]
    with Recording() as recording:
        async with agent.session() as session:
            await session.step("one")
            async with await session.fork() as fork, anyio.create_task_group() as group:
                group.start_soon(session.step, "two")
                group.start_soon(fork.step, "three")
        with pytest.raises(DSparkError):
            await broken.run("fail")
    await agent.run("not recorded")

    timeline = recording.timeline()
    assert [step.agent for step in timeline.steps] == ["a", "a", "a", "broken"]
    assert len(timeline.lanes) == 3
    assert [step.error for step in timeline.steps] == [None, None, None, "ModelError"]


@pytest.mark.anyio
async def test_a_cancelled_step_ends_where_it_was_cancelled() -> None:
    call = ToolCallPart(tool_name="nap", args={"seconds": 60})
    agent = Agent(calls_then_answers(call), tools=[nap])
    with Recording() as recording, pytest.raises(DSparkError):
        await agent.run("go", limits=UsageLimits(wall_seconds=0.05))

    (step,) = recording.timeline().steps
    assert step.error == "cancelled"
    assert step.tools[0].outcome == "unfinished"
    assert step.tools[0].end_s <= step.end_s < 30


@pytest.mark.anyio
async def test_recordings_inside_each_other_and_inside_tools_share_what_they_see() -> None:
    helper = Agent(TestModel(custom_output_text="helped"), name="helper")
    inner = Recording()

    async def ask() -> str:
        """Ask the helper."""
        with inner:
            return (await helper.run("help")).output

    call = ToolCallPart(tool_name="ask")
    with Recording() as outer:
        result = await Agent(calls_then_answers(call), tools=[ask]).run("go")

    assert [step.agent for step in inner.timeline().steps] == ["helper"]
    assert result.timeline().steps == outer.timeline().steps
    assert [step.parent for step in outer.timeline().steps] == [None, 0, None]
    with pytest.raises(UserError, match="records once"), inner:
        pass


def test_there_is_no_timeline_of_nothing() -> None:
    with Recording() as recording:
        pass
    with pytest.raises(UserError, match="no step was taken"):
        recording.timeline()


def test_tokens_are_put_down_to_who_proposed_them() -> None:
    from dspark_agent.step import StepKind
    from dspark_agent.trace import StepTrace

    trace = StepTrace("a", "m", "p", "c", 0, StepKind.TEXT, 1)
    for source, text in [("forced", "{"), ("model", "x"), ("model", "y"), ("copy", "zz")]:
        trace.wrote(source, len(text), text)
    assert [(run.source, run.tokens, run.text) for run in trace.token_runs] == [
        ("forced", 1, "{"),
        ("model", 2, "xy"),
        ("copy", 2, "zz"),
    ]
    ends = [run.ended for run in trace.token_runs]
    assert ends == sorted(ends)
    assert ends[-1] <= time.perf_counter()
