"""What a caller sees while steps are taken: deltas, partial results, step ends with metrics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    TextPart,
    ToolCallDelta,
    ToolCallEnd,
    ToolCallPart,
    ToolCallStart,
    ToolResult,
    UsageLimitExceeded,
    UsageLimits,
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


async def test_text_is_no_sign_of_the_end_where_a_tool_call_can_follow() -> None:
    turns: Iterator[Sequence[TextPart | ToolCallPart] | str] = iter([
        [TextPart(content="Let me weigh it."), ToolCallPart(tool_name="weigh", args={"what": "b"})],
        "Three grams.",
    ])  # fmt: skip
    agent = Agent(FunctionModel(lambda messages, turn: next(turns)), tools=[weigh])
    async with agent.run_stream("Go") as stream:
        texts = [text async for text in stream.stream_text()]
        result = await stream.result()
    assert texts[-1] == result.output == "Three grams."
    assert "Let me weigh it." in texts
    assert [len(step.tool_results) for step in result.steps] == [1, 0]


async def test_the_output_comes_last_as_validators_leave_it() -> None:
    agent = Agent(TestModel(custom_output_args={"title": "rye bread"}), output_type=Recipe)

    @agent.output_validator
    def capital(recipe: Recipe) -> Recipe:
        return Recipe(title=recipe.title.title())

    async with agent.run_stream("Go") as stream:
        seen = [value async for value in stream.stream_output()]
    assert seen[-2:] == [Recipe(title="rye bread"), Recipe(title="Rye Bread")]


async def test_a_functions_output_grows_as_its_arguments_and_ends_as_its_value() -> None:
    def bake(title: str) -> Recipe:
        """Bake it."""
        return Recipe(title=title, steps=["bake"])

    model = TestModel(custom_output_args={"title": "rye bread"})
    async with Agent(model, output_type=bake).run_stream("Go") as stream:
        seen = [value async for value in stream.stream_output()]
    assert seen[-2:] == [{"title": "rye bread"}, Recipe(title="rye bread", steps=["bake"])]


class Loop:
    """A model that calls ``weigh`` for ever, and what happened around it."""

    def __init__(self) -> None:
        self.turns = 0
        self.weighed = 0
        self.stopped = 0
        self.model = FunctionModel(self.answer)

    def answer(self, messages: list[ModelMessage], turn: ModelTurn) -> ToolCallPart:
        self.turns += 1
        return ToolCallPart(tool_name="weigh", args={"what": str(self.turns)})

    async def weigh(self, what: str) -> str:
        """Weigh it; the third time takes for ever."""
        if what == "3":
            try:
                await anyio.sleep_forever()
            finally:
                self.stopped += 1
        self.weighed += 1
        return what


@pytest.mark.parametrize("done", [1, 2])
async def test_what_was_seen_to_end_is_never_lost_by_leaving(done: int) -> None:
    loop = Loop()
    async with Agent(loop.model, tools=[loop.weigh]).run_stream("Go") as stream:
        async for event in stream:
            if isinstance(event, StepEnd) and event.step == done - 1:
                break
    kinds = [part.part_kind for message in stream.history.messages for part in message.parts]
    assert kinds[: 1 + 2 * done] == ["user-prompt", *["tool-call", "tool-return"] * done]
    assert loop.turns <= done + 1


async def test_leaving_stops_a_tool_at_once_and_the_history_goes_on() -> None:
    loop = Loop()
    agent = Agent(loop.model, tools=[loop.weigh])
    async with agent.run_stream("Go") as stream:
        async for event in stream:
            if isinstance(event, ToolCallEnd) and event.step == 2:
                await anyio.wait_all_tasks_blocked()
                break
    assert loop.stopped == 1
    assert loop.turns == 3
    history = stream.history
    assert [message.kind for message in history.messages] == [
        "request", "response", "request", "response", "request",
    ]  # fmt: skip
    resumed = await agent.run(message_history=history, model=TestModel(call_tools=[]))
    assert resumed.output
    assert len(resumed.new_messages()) == 1


async def test_a_run_that_fails_leaves_the_steps_that_were_done() -> None:
    loop = Loop()
    agent = Agent(loop.model, tools=[loop.weigh])
    async with agent.run_stream("Go", limits=UsageLimits(request_limit=2)) as stream:
        with pytest.raises(UsageLimitExceeded):
            await stream.result()
    assert len(stream.history.messages) == 5
