"""Sessions of typed steps: what one may emit, what it gives back, what a failed one leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
import pytest
from pydantic import BaseModel

from dspark_agent import (
    Agent,
    FunctionModel,
    JsonSchema,
    ModelMessage,
    ModelRetry,
    ModelTurn,
    OutputError,
    RetryPromptPart,
    RunContext,
    SessionClosedError,
    StepKind,
    SystemPromptPart,
    TestModel,
    ToolCallPart,
    ToolRetriesExceeded,
    UsageLimitExceeded,
    UsageLimits,
    UserError,
    UserPromptPart,
)

pytestmark = pytest.mark.anyio


class Plan(BaseModel):
    title: str
    size: int


def read_file(path: str) -> str:
    """Read a file."""
    return f"text of {path}"


def edit_file(path: str, text: str) -> str:
    """Edit a file."""
    return f"{path} is now {text}"


class Script:
    """A model that answers from a list and remembers what each turn was allowed to emit."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.turns: list[ModelTurn] = []
        self.heard: list[list[ModelMessage]] = []
        self.model = FunctionModel(self.answer)

    def answer(self, messages: list[ModelMessage], turn: ModelTurn) -> Any:
        self.turns.append(turn)
        self.heard.append(messages)
        return self.answers.pop(0)


def agent_on(*answers: Any, **options: Any) -> tuple[Agent[Any, str], Script]:
    script = Script(*answers)
    return Agent(script.model, tools=[read_file, edit_file], **options), script


def call(name: str, **args: Any) -> ToolCallPart:
    return ToolCallPart(tool_name=name, args=args)


async def test_an_output_type_alone_offers_no_tools() -> None:
    agent, script = agent_on('{"title": "t", "size": 2}')
    async with agent.session() as session:
        step = await session.step("Plan it", output_type=Plan)
    assert step.output == Plan(title="t", size=2)
    assert (step.kind, step.is_final, step.attempts) == (StepKind.TYPED_RESULT, True, 1)
    (turn,) = script.turns
    assert turn.tools == ()
    assert not turn.allow_text
    assert turn.output_schema is not None


async def test_a_named_tool_is_the_only_way_on() -> None:
    agent, script = agent_on(call("read_file", path="a"))
    async with agent.session() as session:
        step = await session.step("Look", tool_choice="read_file")
    assert step.tool_result == "text of a"
    assert (step.kind, step.is_final) == (StepKind.TOOL_CALL, False)
    (turn,) = script.turns
    assert (turn.tool_names, turn.tool_choice) == (("read_file",), "read_file")
    assert not turn.allow_text
    with pytest.raises(UserError, match="it called read_file"):
        _ = step.output


async def test_nothing_narrowed_is_every_tool_or_the_agents_output() -> None:
    agent, script = agent_on("done")
    async with agent.session() as session:
        step = await session.step("Go")
    assert (step.output, step.kind) == ("done", StepKind.MIXED)
    assert script.turns[0].tool_names == ("read_file", "edit_file")
    assert script.turns[0].tool_choice == "auto"
    assert script.turns[0].allow_text


@pytest.mark.parametrize(
    ("options", "names", "choice"),
    [
        ({"tools": ["read_file"]}, ("read_file",), "auto"),
        ({"tools": ["edit_file", "read_file"]}, ("read_file", "edit_file"), "auto"),
        ({"tools": []}, (), "none"),
        ({"tool_choice": "none"}, (), "none"),
        ({"output_type": Plan, "tools": ["read_file"]}, ("read_file",), "auto"),
        ({"output_type": Plan, "tool_choice": "auto"}, ("read_file", "edit_file"), "auto"),
    ],
)
async def test_each_step_narrows_its_choice(
    options: dict[str, Any], names: tuple[str, ...], choice: str
) -> None:
    agent, script = agent_on('{"title": "t", "size": 1}')
    async with agent.session() as session:
        await session.step("Go", **options)
    assert (script.turns[0].tool_names, script.turns[0].tool_choice) == (names, choice)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tools": ["reed_file"]}, "no tool 'reed_file'; it has: read_file, edit_file"),
        ({"tool_choice": "reed_file"}, "no tool 'reed_file'"),
        ({"tools": ["read_file"], "tool_choice": "edit_file"}, "not one of"),
        ({"tools": [], "tool_choice": "required"}, "at least one tool"),
        ({"tools": "read_file"}, "list of names"),
    ],
)
async def test_a_choice_that_cannot_be_is_an_error_at_once(
    options: dict[str, Any], says: str
) -> None:
    agent, script = agent_on()
    async with agent.session() as session:
        with pytest.raises(UserError, match=says):
            await session.step("Go", **options)
    assert script.turns == []


async def test_arguments_that_are_decided_leave_the_model_the_rest() -> None:
    agent, script = agent_on(call("edit_file", path="a", text="new"))
    texts = JsonSchema({"enum": ["new", "old"]})
    async with agent.session() as session:
        step = await session.step("Go", tool_choice="edit_file", args={"path": "a", "text": texts})
    assert step.tool_result == "a is now new"
    assert script.turns[0].tools[0].parameters["properties"] == {
        "path": {"const": "a"},
        "text": {"enum": ["new", "old"]},
    }


async def test_a_model_that_ignores_decided_arguments_is_refused() -> None:
    agent, _ = agent_on(call("read_file", path="b"), call("read_file", path="a"))
    async with agent.session() as session:
        step = await session.step("Go", tool_choice="read_file", args={"path": "a"})
    assert (step.tool_result, step.attempts) == ("text of a", 2)
    assert "'a' was expected" in str(session.steps[0].retry_reason)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"args": {"path": "a"}}, "name it with tool_choice"),
        ({"args": {"path": "a"}, "tool_choice": "required"}, "name it with tool_choice"),
        ({"args": {"file": "a"}, "tool_choice": "read_file"}, "no parameter 'file'; it has: path"),
        ({"args": {"path": object()}, "tool_choice": "read_file"}, "no JSON value"),
    ],
)
async def test_arguments_that_cannot_be_decided(options: dict[str, Any], says: str) -> None:
    agent, _ = agent_on()
    async with agent.session() as session:
        with pytest.raises(UserError, match=says):
            await session.step("Go", **options)


async def test_after_a_refusal_another_temperature_breaks_the_circle() -> None:
    agent, script = agent_on(
        "no json", "no json", '{"title": "t", "size": 1}', "x", model_settings={"seed": 5}
    )
    async with agent.session(model_settings={"retry_temperature": 0.7}) as session:
        await session.step("Plan", output_type=Plan, retries=2)
        await session.step("Go", tools=[])
    assert [turn.settings for turn in script.turns] == [
        {"seed": 5},
        {"seed": 6, "temperature": 0.7},
        {"seed": 7, "temperature": 0.7},
        {"seed": 5},
    ]


async def test_settings_go_from_the_general_to_the_particular() -> None:
    agent, script = agent_on("a", model_settings={"temperature": 0.1, "seed": 1})
    async with agent.session(model_settings={"seed": 2, "max_tokens": 5}) as session:
        await session.step("Go", settings={"max_tokens": 9})
    assert script.turns[0].settings == {"temperature": 0.1, "seed": 2, "max_tokens": 9}


async def test_a_refused_output_is_asked_for_again_with_the_reason() -> None:
    agent, script = agent_on('{"title": "t"}', "no json", '{"title": "t", "size": 3}')
    async with agent.session() as session:
        step = await session.step("Plan", output_type=Plan, retries=2)
        assert step.output.size == 3
        assert step.attempts == 3
        assert [s.retry_reason for s in session.steps] == [
            "size: Field required",
            session.steps[1].retry_reason,
            None,
        ]
    assert "not valid JSON" in str(session.steps[1].retry_reason)
    last = script.heard[-1][-1].parts[-1]
    assert isinstance(last, RetryPromptPart)
    assert "not valid JSON" in last.content
    assert script.turns[0].tools == script.turns[2].tools == ()


async def test_after_the_retries_the_error_has_the_last_text() -> None:
    agent, _ = agent_on("first", "second")
    async with agent.session() as session:
        before = session.history
        with pytest.raises(OutputError, match="not valid JSON") as caught:
            await session.step("Plan", output_type=Plan, retries=1)
        assert (caught.value.text, caught.value.attempts) == ("second", 2)
        assert session.history == before
        assert session.usage.requests == 2


async def test_a_tools_complaint_leads_to_the_same_choice_again() -> None:
    agent, script = agent_on(call("read_file"), call("read_file", path="b"))
    async with agent.session() as session:
        step = await session.step("Look", tool_choice="read_file")
    assert (step.tool_result, step.attempts) == ("text of b", 2)
    assert [turn.tool_choice for turn in script.turns] == ["read_file", "read_file"]


async def test_a_tool_that_keeps_complaining_ends_the_step() -> None:
    agent, _ = agent_on(*[call("read_file")] * 3, retries=2)
    async with agent.session() as session:
        with pytest.raises(ToolRetriesExceeded, match="path: Field required"):
            await session.step("Look", tool_choice="read_file")
        assert session.messages == ()


async def test_a_step_that_needs_a_call_takes_no_text_for_it() -> None:
    agent, _ = agent_on("I would rather talk", call("read_file", path="a"))
    async with agent.session() as session:
        step = await session.step("Look", tool_choice="required")
    assert step.attempts == 2
    assert "needs a tool call" in str(session.steps[0].retry_reason)


async def test_results_of_tools_go_along_with_the_next_prompt() -> None:
    agent, script = agent_on(call("read_file", path="a"), "fine")
    async with agent.session() as session:
        await session.step("Look", tool_choice="read_file")
        await session.step("And?", output_type=str)
    kinds = [[part.part_kind for part in message.parts] for message in script.heard[1]]
    assert kinds == [["user-prompt"], ["tool-call"], ["tool-return", "user-prompt"]]


async def test_no_prompt_lets_the_model_go_on_from_its_results() -> None:
    agent, _ = agent_on(call("read_file", path="a"), "fine")
    async with agent.session() as session:
        await session.step("Look", tool_choice="read_file")
        assert (await session.step()).output == "fine"
        with pytest.raises(UserError, match="nothing to answer"):
            await session.step()


async def test_validators_look_at_the_agents_own_output_only() -> None:
    script = Script("bad", "good", '{"title": "bad", "size": 1}')
    agent = Agent(script.model, deps_type=str)

    @agent.output_validator
    async def check(ctx: RunContext[str], output: str) -> str:
        if output == "bad":
            raise ModelRetry(f"{ctx.deps} does not like it")
        return output.upper()

    async with agent.session(deps="Ada") as session:
        step = await session.step("Go")
        assert (step.output, step.attempts) == ("GOOD", 2)
        assert session.steps[0].retry_reason == "Ada does not like it"
        assert (await session.step("Plan", output_type=Plan)).output.title == "bad"


async def test_a_bare_schema_gives_plain_data() -> None:
    agent, _ = agent_on('{"n": 0}', '{"n": 4}')
    schema = JsonSchema({"type": "object", "properties": {"n": {"type": "integer", "minimum": 1}}})
    async with agent.session() as session:
        step = await session.step("Count", output_type=schema)
    assert step.output == {"n": 4}
    assert "minimum" in str(session.steps[0].retry_reason)


async def test_a_repeated_call_is_pointed_out_and_then_no_longer_offered() -> None:
    again = call("read_file", path="a")
    agent, script = agent_on(again, again, again, call("edit_file", path="a", text="b"), "done")
    async with agent.session(limits=UsageLimits(repeat_call_limit=1)) as session:
        results = [(await session.step("Go" if n == 0 else None)).tool_results for n in range(4)]
        await session.step()
    notes = [parts[0].note for parts in results]
    assert notes[0] is None
    assert "call number 2" in str(notes[1])
    assert "call number 3" in str(notes[2])
    assert notes[3] is None
    offered = [turn.tool_names for turn in script.turns]
    everything = ("read_file", "edit_file")
    assert offered == [everything, everything, everything, ("edit_file",), everything]


async def test_a_step_with_one_way_on_keeps_it_however_often_it_was_taken() -> None:
    agent, script = agent_on(*[call("read_file", path="a")] * 4)
    async with agent.session() as session:
        for _ in range(4):
            await session.step("Again", tool_choice="read_file")
    assert script.turns[3].tool_names == ("read_file",)


async def test_a_limit_of_the_step_binds_that_step_alone() -> None:
    agent, script = agent_on("one two three", "four")
    async with agent.session(limits=UsageLimits(output_tokens_limit=100)) as session:
        await session.step("Go", limits=UsageLimits(output_tokens_limit=7))
        with pytest.raises(UsageLimitExceeded):
            await session.step("Go", limits=UsageLimits(request_limit=0))
        await session.step("Go")
    assert [turn.settings.get("max_tokens") for turn in script.turns] == [7, 97]


async def test_tool_calls_past_the_limit_are_not_run() -> None:
    agent, _ = agent_on([call("read_file", path="a"), call("read_file", path="b")])
    async with agent.session(limits=UsageLimits(tool_calls_limit=1)) as session:
        with pytest.raises(UsageLimitExceeded, match="tool_calls_limit of 1"):
            await session.step("Go")
        assert session.messages == ()
        assert session.usage.tool_calls == 0


async def test_metrics_add_up_to_the_wall_clock_tools_included() -> None:
    async def slow() -> str:
        """Slow."""
        await anyio.sleep(0.05)
        return "done"

    agent = Agent(TestModel(), tools=[slow])
    async with agent.session() as session:
        step = await session.step("Go", tool_choice="slow")
    assert step.metrics.tool_s >= 0.05
    assert step.metrics.parts_s == pytest.approx(step.metrics.total_s, rel=0.02)


async def test_instructions_open_the_conversation_once() -> None:
    script = Script("a", "b")
    agent = Agent(script.model, instructions=["Be brief."], deps_type=str)

    @agent.instructions
    async def name(ctx: RunContext[str]) -> str:
        return f"The user is {ctx.deps}."

    @agent.instructions
    def nothing() -> str:
        return ""

    async with agent.session(deps="Ada") as session:
        await session.step("Hi")
        await session.step("Hi again")
    first = script.heard[1][0].parts
    assert [part.part_kind for part in first] == ["system-prompt", "user-prompt"]
    assert first[0] == SystemPromptPart(content="Be brief.\n\nThe user is Ada.")
    assert [p.part_kind for p in script.heard[1][2].parts] == ["user-prompt"]


async def test_rollback_forgets_and_fork_goes_its_own_way() -> None:
    agent, script = agent_on("a", "b", "c", "d")
    async with agent.session() as session:
        await session.step("one")
        mark = session.mark()
        await session.step("two")
        await session.rollback(mark)
        assert len(session.messages) == 2
        async with await session.fork() as child:
            await child.step("three")
            assert len(child.messages) == 4
        await session.step("four")
    prompts = [
        [part.content for m in heard for part in m.parts if isinstance(part, UserPromptPart)]
        for heard in script.heard
    ]
    assert prompts[2:] == [["one", "three"], ["one", "four"]]


async def test_one_step_at_a_time() -> None:
    async def wait(messages: list[ModelMessage], turn: ModelTurn) -> str:
        await anyio.sleep(0.05)
        return "done"

    agent = Agent(FunctionModel(wait))
    async with agent.session() as session, anyio.create_task_group() as group:
        group.start_soon(session.step, "one")
        await anyio.wait_all_tasks_blocked()
        for second in (session.step("two"), session.fork(), session.rollback(session.mark())):
            with pytest.raises(SessionClosedError, match="in flight"):
                await second
    assert len(session.messages) == 2


async def test_a_closed_session_takes_no_step_but_keeps_its_history() -> None:
    agent, _ = agent_on("a")
    session = agent.session()
    with pytest.raises(SessionClosedError, match="async with"):
        await session.step("early")
    async with session:
        await session.step("Hi")
    with pytest.raises(SessionClosedError):
        await session.step("late")
    assert len(session.history.messages) == 2


async def test_deps_that_were_promised_must_be_given() -> None:
    agent = Agent(TestModel(), deps_type=int, name="counter")
    with pytest.raises(UserError, match=r"'counter' needs deps of type int"):
        agent.session()


def _raises(error: Exception) -> Callable[[], None]:
    def explode() -> None:
        """Explode."""
        raise error

    return explode


async def test_a_bug_in_a_tool_comes_out_as_it_is_and_undoes_the_step() -> None:
    agent = Agent(TestModel(), tools=[_raises(ZeroDivisionError("bug"))])
    async with agent.session() as session:
        with pytest.raises(ZeroDivisionError, match="bug"):
            await session.step("Go", tool_choice="explode")
        assert session.messages == ()
        assert (await session.step("Go", tools=[])).is_final
