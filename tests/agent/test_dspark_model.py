"""The embedded model: the real small one, through the same steps that the test doubles take."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import anyio
import pytest
from pydantic import BaseModel, Field

from dspark_agent import (
    Agent,
    ContextLengthError,
    DeadlineExceeded,
    DSparkModel,
    FinishReason,
    FunctionToolset,
    History,
    JsonSchema,
    ModelNotFoundError,
    RunContext,
    SchemaError,
    SqliteJournal,
    StepEnd,
    StepStart,
    TextDelta,
    ToolCallDelta,
    ToolCallEnd,
    ToolCallStart,
    ToolResult,
    UsageLimits,
)
from dspark_backend.engine import Engine

pytestmark = pytest.mark.real_model


class Pet(BaseModel):
    name: str = Field(max_length=20)
    kind: Literal["cat", "dog"]
    age: int = Field(ge=0, le=30)


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: the first
        b: the second
    """
    return a + b


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.load("smollm2-135m", max_context=1024, threads=1) as engine:
        yield engine


@pytest.fixture
def model(engine: Engine) -> DSparkModel:
    return DSparkModel("smollm2-135m", engine=engine, settings={"max_tokens": 48})


@pytest.mark.anyio
async def test_typed_steps_tools_and_text_go_on_from_one_token_log(model: DSparkModel) -> None:
    agent = Agent(model, tools=[add], instructions="You are a helpful assistant.")
    async with agent.session() as session:
        typed = await session.step("Rex is a dog of 3 years.", output_type=Pet)
        assert isinstance(typed.output, Pet)
        log = session.history.token_log
        called = await session.step("Add 2 and 3.", tool_choice="add")
        assert called.tool_calls[0].tool_name == "add"
        assert called.tool_result == sum(called.tool_calls[0].args.values())  # type: ignore[union-attr]
        text = await session.step("Say hello.", output_type=str)
        assert text.output
        grown = session.history.token_log
    assert log is not None
    assert grown is not None
    assert grown[: len(log)] == log
    for step in (called, text):
        history = step.metrics.prefill_cached_tokens + step.metrics.prefill_new_tokens
        assert step.response.usage.input_tokens == history
        assert step.metrics.prefill_cached_tokens > 0.75 * history
    for step in session.steps:
        assert step.metrics.parts_s == pytest.approx(step.metrics.total_s, rel=0.02)
    assert called.metrics.accepted["forced"] > called.metrics.new_tokens / 2


@pytest.mark.anyio
async def test_every_token_is_put_down_to_who_proposed_it(
    model: DSparkModel, engine: Engine
) -> None:
    async with Agent(model, tools=[add]).session() as session:
        called = await session.step("Add 20 and 22.", tool_choice="add")
        typed = await session.step("Rex is a dog of 3 years.", output_type=Pet)
        await session.step("Say hello.", output_type=str)
        log = session.history.token_log
    assert log is not None
    for step in session.steps:
        trace = step.trace
        assert trace is not None
        runs = trace.token_runs
        counts: dict[str, int] = {}
        for run in runs:
            counts[run.source] = counts.get(run.source, 0) + run.tokens
        assert counts == {source: n for source, n in step.metrics.accepted.items() if n}
        assert sum(counts.values()) == step.metrics.new_tokens
        assert all(one.source != two.source for one, two in pairwise(runs))
        ends = [run.ended for run in runs]
        assert ends == sorted(ends)
        assert trace.model_ended is not None
        assert trace.began <= ends[0] <= ends[-1] <= trace.model_ended
    assert typed.trace is not None
    assert "".join(run.text for run in typed.trace.token_runs) == typed.text
    assert called.trace is not None
    markup = "".join(run.text for run in called.trace.token_runs)
    assert called.tool_calls[0].args_json() in markup
    assert markup in engine.tokenizer.decode(log)


@pytest.mark.anyio
async def test_a_tool_call_streams_its_name_then_its_arguments(model: DSparkModel) -> None:
    events: list[Any] = []
    async with Agent(model, tools=[add]).session(on_event=events.append) as session:
        step = await session.step("Add 20 and 22.", tool_choice="add")
        await session.step("Say hello.", output_type=str)
    kinds = [type(event) for event in events]
    assert kinds[:2] == [StepStart, ToolCallStart]
    first_end = kinds.index(StepEnd)
    assert kinds[first_end - 2 : first_end] == [ToolCallEnd, ToolResult]
    deltas = "".join(event.delta for event in events if isinstance(event, ToolCallDelta))
    assert deltas == step.tool_calls[0].args_json()
    said = "".join(event.delta for event in events if isinstance(event, TextDelta))
    assert said == session.steps[-1].text


@pytest.mark.anyio
async def test_arguments_that_are_decided_cost_no_choice(model: DSparkModel) -> None:
    async with Agent(model, tools=[add]).session() as session:
        free = await session.step("Add 2 and 3.", tool_choice="add")
        fixed = await session.step("Add 4 and 5.", tool_choice="add", args={"a": 4, "b": 5})
        some = await session.step(
            "Add 6 and 7.", tool_choice="add", args={"b": JsonSchema({"enum": [70, 700]})}
        )
    assert fixed.tool_calls[0].args == {"a": 4, "b": 5}
    assert fixed.metrics.cycles < free.metrics.cycles
    assert isinstance(some.tool_calls[0].args, dict)
    assert some.tool_calls[0].args["b"] in (70, 700)


@pytest.mark.anyio
async def test_a_seed_gives_the_same_text_whatever_runs_beside_it(model: DSparkModel) -> None:
    agent = Agent(model, model_settings={"temperature": 0.9, "seed": 11, "max_tokens": 16})
    alone = (await agent.run("Tell me about the sea.")).output
    outputs: list[str] = []

    async def run(prompt: str) -> None:
        outputs.append((await agent.run(prompt)).output)

    async with anyio.create_task_group() as group:
        for prompt in ("Tell me about the sea.", "Tell me about trees."):
            group.start_soon(run, prompt)
    assert alone in outputs
    assert len(set(outputs)) == 2


@pytest.mark.anyio
async def test_cancelling_a_step_ends_its_token_loop_and_undoes_it(
    model: DSparkModel, engine: Engine
) -> None:
    async with Agent(model).session(model_settings={"max_tokens": 600}) as session:
        first = await session.step("Say hello.", settings={"max_tokens": 4})
        before = session.history
        with anyio.move_on_after(0.3) as scope:
            await session.step("Write a very long story.", settings={"logit_bias": _no_end(engine)})
        assert scope.cancelled_caught
        assert session.history == before
        assert session.steps == (first,)
        again = await session.step("Say hello.", settings={"max_tokens": 4})
        assert again.metrics.prefill_cached_tokens > 0


@pytest.mark.anyio
async def test_a_deadline_reaches_the_token_loop(model: DSparkModel, engine: Engine) -> None:
    agent = Agent(model, model_settings={"max_tokens": 600, "logit_bias": _no_end(engine)})
    with pytest.raises(DeadlineExceeded):
        await agent.run("Write a very long story.", limits=UsageLimits(wall_seconds=0.3))


@pytest.mark.anyio
async def test_a_listener_that_fails_stops_the_token_loop(
    model: DSparkModel, engine: Engine
) -> None:
    def listen(event: object) -> None:
        if isinstance(event, TextDelta):
            raise OSError("no terminal")

    settings = {"max_tokens": 600, "logit_bias": _no_end(engine)}
    async with Agent(model).session(on_event=listen, model_settings=settings) as session:  # type: ignore[arg-type]
        with pytest.raises(OSError, match="no terminal"):
            await session.step("Write a very long story.")
        assert session.history.token_log == ()


def _no_end(engine: Engine) -> dict[int, float]:
    """Keeps the model from ending its turn."""
    return dict.fromkeys(engine.tokenizer.eos_token_ids, -1e9)


@pytest.mark.anyio
async def test_a_stored_history_is_gone_on_from_token_by_token(model: DSparkModel) -> None:
    agent = Agent(model, tools=[add])
    async with agent.session() as session:
        await session.step("Add 2 and 3.", tool_choice="add")
        stored = session.history.model_dump_json()
        straight = await session.step("What is it?", output_type=str)
    async with agent.session(history=History.model_validate_json(stored)) as resumed:
        again = await resumed.step("What is it?", output_type=str)
        assert resumed.history.token_log == session.history.token_log
    assert again.output == straight.output
    assert again.response.usage.input_tokens == straight.response.usage.input_tokens
    assert again.metrics.prefill_new_tokens <= straight.metrics.prefill_new_tokens


@pytest.mark.anyio
async def test_a_restored_log_was_told_of_the_result_already(model: DSparkModel) -> None:
    async with Agent(model).session() as session:
        await session.step("Rex is a dog of 3.", output_type=Pet)
        stored = session.history.model_dump_json()
        straight = await session.step("Tom is a cat of 5.", output_type=Pet)
    async with Agent(model).session(history=History.model_validate_json(stored)) as resumed:
        again = await resumed.step("Tom is a cat of 5.", output_type=Pet)
        assert resumed.history.token_log == session.history.token_log
        async with await resumed.fork() as child:
            await child.step("Kit is a cat of 1.", output_type=Pet)
            new = (child.history.token_log or ())[len(resumed.history.token_log or ()) :]
    assert again.output == straight.output
    assert '"kind": "cat" | "dog"' not in (await model.load()).tokenizer.decode(new)


@pytest.mark.anyio
async def test_a_log_that_does_not_fit_leaves_no_session_open(
    model: DSparkModel, engine: Engine
) -> None:
    history = History(
        messages=(), model_name="smollm2-135m", token_log=(1,) * 1024, logged_messages=0
    )
    before = len(engine._sessions)
    with pytest.raises(ContextLengthError):
        async with Agent(model).session(history=history):
            pass
    fits = history.model_copy(update={"token_log": (1,) * 1000})
    with anyio.move_on_after(0.02) as scope:
        async with Agent(model).session(history=fits):
            pass
    assert scope.cancelled_caught
    with anyio.fail_after(10):
        while len(engine._sessions) > before:  # the engine ends the step that was on its way
            await anyio.sleep(0.01)


@pytest.mark.anyio
async def test_a_run_goes_on_from_its_journal_token_by_token(
    model: DSparkModel, tmp_path: Path
) -> None:
    failing = [True]

    def look(n: int) -> str:
        """Look."""
        return f"{n} is a dog of 3 years called Rex"

    async def drive(run_id: str, fails: bool) -> Any:
        async with agent.iter("Look at 7.", journal=journal, run_id=run_id) as run:
            await run.step(tool_choice="look")
            if fails and failing:
                raise failing.pop() and OSError("the power is gone")
            return await run.step(tools=[]), run.result

    journal = SqliteJournal(tmp_path / "runs.sqlite")
    agent = Agent(model, tools=[look], output_type=Pet)
    _, whole = await drive("whole", False)
    with pytest.raises(OSError, match="power"):
        await drive("cut", True)
    step, resumed = await drive("cut", True)
    assert resumed.output == whole.output
    assert resumed.history.token_log == whole.history.token_log
    first, last = whole.steps[0].metrics, whole.steps[-1].metrics
    # All of the first step is there. How much of the tool's answer the other run computed while
    # its tool was at work depends on the machine.
    reached = first.prefill_new_tokens + first.prefill_cached_tokens + first.new_tokens
    assert step.metrics.prefill_cached_tokens >= reached
    replayed, _ = await drive("whole", False)
    assert replayed.metrics == last


@pytest.mark.anyio
async def test_a_history_of_other_tools_is_rendered_anew(model: DSparkModel) -> None:
    one = Agent(model, model_settings={"max_tokens": 8})
    two = Agent(model, tools=[add])
    history = (await one.run("Hello.")).history
    async with two.session(history=history) as session:
        step = await session.step("Add 2 and 3.", tool_choice="add")
        log = session.history.token_log
    assert step.tool_calls[0].tool_name == "add"
    assert log is not None
    assert history.token_log is not None
    assert log[: len(history.token_log)] != history.token_log


@pytest.mark.anyio
async def test_a_fork_starts_from_its_parents_work(model: DSparkModel) -> None:
    async with Agent(model, model_settings={"max_tokens": 8}).session() as session:
        await session.step("My name is Ada. Remember it.")
        async with await session.fork() as child:
            step = await child.step("Say hello.")
            assert step.metrics.prefill_cached_tokens > step.metrics.prefill_new_tokens
        assert len(session.messages) == 2
        mark = session.mark()
        once = await session.step("Who am I?")
        await session.rollback(mark)
        assert (await session.step("Who am I?")).output == once.output


@pytest.mark.anyio
async def test_a_result_is_outlined_once_in_a_log(model: DSparkModel, engine: Engine) -> None:
    async with Agent(model).session() as session:
        await session.step("Rex is a dog of 3.", output_type=Pet)
        mark = session.mark()
        await session.step("Tom is a cat of 5.", output_type=Pet)
        text = engine.tokenizer.decode(session.history.token_log or ())
        assert text.count('"kind": "cat" | "dog"') == 1
        await session.rollback(mark)
        await session.step("Tom is a cat of 5.", output_type=JsonSchema({"type": "null"}))
        assert "null" in engine.tokenizer.decode(session.history.token_log or ())


@pytest.mark.anyio
async def test_an_answer_cut_off_is_no_result(model: DSparkModel) -> None:
    async with Agent(model, tools=[add]).session() as session:
        with pytest.raises(Exception, match="cut off at the token limit"):
            await session.step("Rex is a dog.", output_type=Pet, settings={"max_tokens": 6})
        events: list[Any] = []
        session._core.on_event = events.append
        with pytest.raises(Exception, match="Invalid JSON"):
            await session.step("Add 2 and 3.", tool_choice="add", settings={"max_tokens": 26})
        ends = [event.result for event in events if isinstance(event, StepEnd)]
        assert ends[0].response.finish_reason is FinishReason.LENGTH
        assert session.messages == ()


@pytest.mark.anyio
async def test_what_does_not_fit_raises_and_truncates_nothing(model: DSparkModel) -> None:
    async with Agent(model).session() as session:
        with pytest.raises(ContextLengthError, match="1024"):
            await session.step("word " * 2000)
        assert session.messages == ()


@pytest.mark.anyio
async def test_a_schema_that_cannot_be_enforced_is_found_before_the_first_step(
    model: DSparkModel,
) -> None:
    def pick(values: set[int]) -> int:
        """Pick one."""
        return len(values)

    for agent in (
        Agent(model, tools=[pick]),
        Agent(model, toolsets=[FunctionToolset([pick])]),
        Agent(model, output_type=set[int]),
    ):
        with pytest.raises(SchemaError, match="uniqueItems"):
            async with agent.session():
                pass


@pytest.mark.anyio
async def test_a_model_that_is_not_there_is_named(tmp_path: Any) -> None:
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        await Agent(str(tmp_path / "nowhere.gguf")).run("Hi")


def test_an_engine_from_outside_stays_open_and_an_own_one_does_not(engine: Engine) -> None:
    before = threading.active_count()

    async def main() -> None:
        async with Agent(DSparkModel("smollm2-135m", engine=engine)) as agent:
            await agent.run("Hi", model_settings={"max_tokens": 2})
        own = DSparkModel("smollm2-135m", max_context=256, threads=1)
        async with Agent(own, model_settings={"max_tokens": 2}) as agent:
            await agent.run("Hi")
            assert await own.load() is await own.load()
            assert threading.active_count() > before

    anyio.run(main)
    engine.open_session().close()
    names = [thread.name for thread in threading.enumerate()]
    assert names.count("dspark-engine") == 1


@pytest.mark.anyio
async def test_a_tool_forks_the_run_and_computes_nothing_again(model: DSparkModel) -> None:
    answers: list[str] = []
    new: list[int] = []

    async def consider(ctx: RunContext[object]) -> str:
        """Consider the question."""
        async with await ctx.fork() as fork:
            step = await fork.step("Answer with one word.", tools=[])
            answers.append(step.output)
            new.append(step.metrics.prefill_new_tokens)
        return "considered"

    agent = Agent(model, instructions="You answer questions. " * 20, tools=[consider])
    async with agent.session() as session:
        hello = await session.step("Say hello.", tools=[], settings={"max_tokens": 4})
        asked = await session.step("Is the sky blue?", tool_choice="consider")
        assert asked.tool_result == "considered"
        assert answers
        assert answers[0]
        # The instructions, the tools and the first turn were there already.
        begin = hello.response.usage.input_tokens
        assert new[0] < 60 < begin
        again = await session.step("Say hello again.", tools=[], settings={"max_tokens": 4})
        assert again.metrics.prefill_cached_tokens > begin
        assert session.usage.requests == 4
