"""What the embedded model does while a tool runs: computed ahead, said never, always the same."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from dspark_agent import Agent, DSparkModel, ModelError, Session, SessionClosedError, StepResult
from dspark_agent.models.ahead import Absences
from dspark_backend.engine import Engine

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Callable[..., Path]) -> Iterator[Engine]:
    folder = tiny_checkpoint("qwen3", max_position_embeddings=2048)
    with Engine.load(folder, threads=1) as loaded:
        yield loaded


def model(engine: Engine) -> DSparkModel:
    return DSparkModel("tiny", engine=engine, settings={"max_tokens": 40})


async def slow() -> str:
    """Slow."""
    await anyio.sleep(0.4)
    return "12 files"


def ahead_of(session: Session[Any, Any]) -> tuple[int, ...]:
    inner: Any = session._core.model_session
    return tuple(inner._ahead.tokens)


def computed(session: Session[Any, Any]) -> int:
    inner: Any = session._core.model_session
    return int(inner._session.cached_tokens)


async def test_the_conversation_is_the_same_with_a_head_start(engine: Engine) -> None:
    seconds = 0.0

    async def count() -> str:
        """Count."""
        await anyio.sleep(seconds)
        return "12 files"

    async def talk() -> tuple[tuple[int, ...], tuple[int, ...], StepResult[str], tuple[int, ...]]:
        async with Agent(model(engine), tools=[count]).session() as session:
            called = await session.step("How many?", tool_choice="count")
            assert called.tool_result == "12 files"
            said, ahead = session.history.token_log or (), ahead_of(session)
            with anyio.fail_after(5):
                while ahead and computed(session) < len(said) + len(ahead):
                    await anyio.sleep(0.01)
            step = await session.step("Say it.", output_type=str)
            assert not ahead_of(session)
            return said, ahead, step, session.history.token_log or ()

    _, nothing, plain, plain_log = await talk()
    assert nothing == ()
    seconds = 0.3
    said, ahead, step, log = await talk()
    assert ahead
    assert log == plain_log
    assert log[: len(said) + len(ahead)] == said + ahead
    assert step.output == plain.output
    # What is ahead was computed, and the end of the call itself with it.
    assert step.metrics.prefill_new_tokens <= plain.metrics.prefill_new_tokens - len(ahead)


async def test_what_was_ahead_is_taken_back_where_something_else_follows(engine: Engine) -> None:
    agent = Agent(model(engine), tools=[slow])
    async with agent.session() as session:
        mark = session.mark()
        await session.step("How many?", tool_choice="slow")
        assert ahead_of(session)
        stored = session.history
        async with await session.fork() as twin:
            assert ahead_of(twin) == ahead_of(session)
            here = await session.step("Say it.", output_type=str)
            there = await twin.step("Say it.", output_type=str)
            assert here.output == there.output
        async with agent.session(history=stored) as resumed:
            again = await resumed.step("Say it.", output_type=str)
            assert again.output == here.output
        await session.rollback(mark)
        assert session.history.token_log == ()
        await session.step("How many?", tool_choice="slow")
        inner: Any = session._core.model_session
        inner._ahead._tokens = (*inner._ahead._tokens[:-1], 9)
        inner._session.log[-1] = 9  # a guess that was wrong
        wrong = await session.step("Say it.", output_type=str)
        assert wrong.output == here.output


async def test_a_step_cancelled_while_its_tool_runs_leaves_nothing_ahead(engine: Engine) -> None:
    async with Agent(model(engine), tools=[slow]).session() as session:
        first = await session.step("Hello.", output_type=str)
        log = session.history.token_log
        with anyio.move_on_after(10) as scope:

            async def give_up(event: object) -> None:
                if type(event).__name__ == "ToolCallEnd":
                    scope.deadline = anyio.current_time() + 0.08

            session._core.on_event = give_up
            await session.step("How many?", tool_choice="slow")
        assert scope.cancelled_caught
        assert session.steps == (first,)
        assert session.history.token_log == log
        assert not ahead_of(session)
        session._core.on_event = None
        assert (await session.step("How many?", tool_choice="slow")).tool_result == "12 files"


async def test_an_engine_closed_meanwhile_is_a_typed_error(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    engine = Engine.load(tiny_checkpoint("qwen3"), threads=1)

    async def closes() -> str:
        """Close."""
        await anyio.to_thread.run_sync(engine.close)
        await anyio.sleep(0.05)
        return "closed"

    async with Agent(model(engine), tools=[closes]).session() as session:
        called = await session.step("Go", tool_choice="closes")
        assert called.tool_result == "closed"
        with pytest.raises((ModelError, SessionClosedError), match="closed"):
            await session.step("Say it.", output_type=str)


def test_a_session_is_expected_back_when_its_tool_usually_is_done() -> None:
    absences = Absences()
    absences.back()
    assert absences.leave("test") is None
    time.sleep(0.02)
    absences.back()
    absences.back()
    usual = absences.leave("test")
    assert usual is not None
    assert usual >= 0.02
    assert absences.leave("other") is None
