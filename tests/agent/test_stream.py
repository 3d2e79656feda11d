"""What a caller sees while steps are taken: deltas, partial results, step ends with metrics."""

from __future__ import annotations

from itertools import pairwise

import anyio
import pytest
from pydantic import BaseModel

from dspark_agent import (
    Agent,
    AgentEvent,
    FunctionModel,
    ModelMessage,
    ModelTurn,
    PartialOutput,
    StepEnd,
    StepStart,
    TestModel,
    TextDelta,
    ToolCallDelta,
    ToolCallEnd,
    ToolCallStart,
    ToolResult,
    UserError,
)

pytestmark = pytest.mark.anyio


class Recipe(BaseModel):
    title: str
    steps: list[str] = []


def weigh(what: str, grams: int = 3) -> int:
    """Weigh it."""
    return grams


async def test_events_come_in_order_and_name_their_step() -> None:
    agent = Agent(TestModel(custom_output_text="all done"), tools=[weigh])
    async with agent.run_stream("Go") as stream:
        events = [event async for event in stream]
        result = await stream.result()
    assert [type(event) for event in events] == [
        StepStart, ToolCallStart, ToolCallDelta, ToolCallDelta, ToolCallEnd, ToolResult, StepEnd,
        StepStart, TextDelta, TextDelta, StepEnd,
    ]  # fmt: skip
    assert [event.step for event in events] == [0] * 7 + [1] * 4
    ends = [event for event in events if isinstance(event, StepEnd)]
    assert tuple(end.result for end in ends) == result.steps
    assert all(end.result.metrics.total_s > 0 for end in ends)
    deltas = [event.delta for event in events if isinstance(event, ToolCallDelta)]
    assert "".join(deltas) == '{"what": "a"}'


async def test_text_is_streamed_whole_or_as_deltas() -> None:
    agent = Agent(TestModel(custom_output_text="one two three"))
    async with agent.run_stream("Go") as stream:
        assert [text async for text in stream.stream_text(delta=True)] == ["one ", "two ", "three"]
    async with agent.run_stream("Go") as stream:
        texts = [text async for text in stream.stream_text()]
    assert texts == ["one ", "one two ", "one two three"]


async def test_a_typed_result_is_seen_growing() -> None:
    answer = '{"title": "Good bread", "steps": ["mix it", "bake it"]}'
    agent = Agent(TestModel(custom_output_text=answer), output_type=Recipe)
    async with agent.run_stream("Go") as stream:
        seen = [value async for value in stream.stream_output()]
        final = (await stream.result()).output
    assert seen[0] == {}
    assert seen[-1] == final == Recipe(title="Good bread", steps=["mix it", "bake it"])
    typed = [value for value in seen if isinstance(value, Recipe)]
    assert [len(value.steps) for value in typed] == sorted(len(value.steps) for value in typed)
    assert all(before != after for before, after in pairwise(seen))


async def test_a_refused_step_says_why_and_starts_again() -> None:
    answers = iter(['{"steps": []}', '{"title": "t"}'])
    agent = Agent(FunctionModel(lambda messages, turn: next(answers)), output_type=Recipe)
    async with agent.run_stream("Go") as stream:
        events = [event async for event in stream]
    ends = [event.result for event in events if isinstance(event, StepEnd)]
    assert [end.retry_reason for end in ends] == ["title: Field required", None]
    starts = [event.attempt for event in events if isinstance(event, StepStart)]
    assert starts == [1, 2]


async def test_an_error_of_the_run_ends_the_stream() -> None:
    def fails(messages: list[ModelMessage], turn: ModelTurn) -> str:
        raise ZeroDivisionError("in the model")

    async with Agent(FunctionModel(fails)).run_stream("Go") as stream:
        with pytest.raises(ZeroDivisionError):
            async for _ in stream:
                pass
        with pytest.raises(ZeroDivisionError):
            await stream.result()


async def test_leaving_early_cancels_the_run() -> None:
    cancelled = False

    async def waits(messages: list[ModelMessage], turn: ModelTurn) -> str:
        nonlocal cancelled
        try:
            await anyio.sleep(60)
        except BaseException:
            cancelled = True
            raise
        return ""

    async with Agent(FunctionModel(waits)).run_stream("Go") as stream:
        async for event in stream:
            assert isinstance(event, StepStart)
            break
    assert cancelled


async def test_what_the_caller_raises_comes_out_bare() -> None:
    agent = Agent(TestModel())
    with pytest.raises(KeyError, match="mine"):
        async with agent.run_stream("Go"):
            raise KeyError("mine")


@pytest.mark.parametrize("is_async", [True, False])
async def test_a_session_tells_a_listener(is_async: bool) -> None:
    heard: list[AgentEvent] = []

    async def listen(event: AgentEvent) -> None:
        heard.append(event)

    agent = Agent(TestModel())
    async with agent.session(on_event=listen if is_async else heard.append) as session:
        await session.step("Go", output_type=Recipe)
    assert isinstance(heard[0], StepStart)
    assert any(isinstance(event, PartialOutput) for event in heard)
    assert isinstance(heard[-1], StepEnd)


async def test_a_listener_that_fails_undoes_the_step() -> None:
    def listen(event: AgentEvent) -> None:
        if isinstance(event, TextDelta):
            raise OSError("no terminal")

    async with Agent(TestModel()).session(on_event=listen) as session:
        with pytest.raises(OSError, match="no terminal"):
            await session.step("Go")
        assert session.messages == ()


async def test_a_stream_has_no_second_listener() -> None:
    with pytest.raises(UserError, match="run_stream gives the events itself"):
        Agent(TestModel()).run_stream("Go", on_event=lambda event: None)
