"""Answers as calls, streams left early and full contexts, on the real small model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import pytest
from pydantic import BaseModel, Field

from dspark_agent import (
    Agent,
    Compaction,
    ContextLengthError,
    DSparkModel,
    PartialOutput,
    TextDelta,
    ToolOutput,
)
from dspark_backend.engine import Engine
from dspark_backend.events import Finished, StepEvent
from dspark_backend.handle import StepHandle
from dspark_backend.request import FinishReason, StepRequest
from dspark_backend.session import Session

pytestmark = [pytest.mark.real_model, pytest.mark.anyio]


@pytest.fixture
def anyio_backend() -> str:
    """The token loop is the engine's: one event loop will do, but where tasks are cancelled."""
    return "asyncio"


class Pet(BaseModel):
    name: str = Field(max_length=20)
    kind: Literal["cat", "dog"]


def rename(name: Literal["Rex", "Tom"]) -> str:
    """Give the pet this name.

    Args:
        name: the pet's new name
    """
    return f"It is called {name}."


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.load("smollm2-135m", max_context=512, threads=1) as engine:
        yield engine


@pytest.fixture
def model(engine: Engine) -> DSparkModel:
    return DSparkModel("smollm2-135m", engine=engine, settings={"max_tokens": 48})


async def test_an_output_tool_is_told_of_and_held_to_by_the_grammar(model: DSparkModel) -> None:
    agent = Agent(model, output_type=ToolOutput(Pet, description="Describe the pet."))
    seen: list[object] = []
    result = await agent.run("Rex is a dog.", on_event=seen.append)
    assert isinstance(result.output, Pet)
    assert [call.tool_name for call in result.steps[0].tool_calls] == ["final_result"]
    assert any(isinstance(event, PartialOutput) for event in seen)
    assert result.history.tool_names == ("final_result",)
    again = await agent.run("And Tom, the cat?", message_history=result.history)
    assert isinstance(again.output, Pet)
    assert again.steps[0].metrics.prefill_cached_tokens > 0


async def test_a_function_ends_the_run_with_its_value(model: DSparkModel) -> None:
    result = await Agent(model, output_type=rename).run("Call it Tom.")
    assert result.output in ("It is called Rex.", "It is called Tom.")


async def test_tools_output_and_text_share_one_pass(model: DSparkModel) -> None:
    agent = Agent(model, output_type=ToolOutput(rename) | Pet | str)
    result = await agent.run("Rex is a dog.")
    assert isinstance(result.output, Pet | str)
    assert len(result.steps) == 1


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_leaving_a_stream_stops_the_token_loop(
    model: DSparkModel, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[StepEvent] = []
    submit = engine.submit

    def heard(
        session: Session, request: StepRequest, *, on_event: Callable[[StepEvent], None]
    ) -> StepHandle:
        def note(event: StepEvent) -> None:
            events.append(event)
            on_event(event)

        return submit(session, request, on_event=note)

    monkeypatch.setattr(engine, "submit", heard)
    agent = Agent(model, model_settings={"max_tokens": 400})
    async with agent.run_stream("Count to 500.") as stream:
        async for event in stream:
            if isinstance(event, TextDelta):
                break
    last = events[-1]
    assert isinstance(last, Finished)
    assert last.outcome.finish_reason is FinishReason.CANCELLED
    assert stream.history.messages == ()
    assert (await agent.run("Say hello.", model_settings={"max_tokens": 4})).output


async def test_a_conversation_outgrows_the_window(model: DSparkModel) -> None:
    """Past the window of 512 tokens, with every token of the log counted."""
    compaction = Compaction(at=0.7, keep_turns=1, summary_tokens=32)
    agent = Agent(model, instructions="You are brief.", compaction=compaction)
    story = "The ferry to the island leaves at nine, at noon and at six, and takes an hour. " * 3
    async with agent.session() as session:
        for n in range(9):
            step = await session.step(f"Part {n}. {story} What did you learn?")
            usage = step.response.usage
            assert usage.input_tokens + usage.output_tokens <= 512
            log = session.history.token_log
            assert log is not None
            assert len(log) == usage.input_tokens + usage.output_tokens
        assert len(session.compactions) >= 2
        assert all(record.context_tokens > 0.7 * 512 - 64 for record in session.compactions)
        assert all(record.summary for record in session.compactions)


async def test_without_a_compaction_the_window_ends_the_conversation(model: DSparkModel) -> None:
    async with Agent(model).session() as session:
        await session.step("Hello.")
        with pytest.raises(ContextLengthError):
            await session.step("word " * 600)
        assert len(session.messages) == 2
