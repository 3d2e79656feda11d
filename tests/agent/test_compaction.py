"""Conversations that fill the context: shortened where it was asked for, never in silence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_agent import (
    Agent,
    AgentEvent,
    Compaction,
    ContextCompacted,
    ContextLengthError,
    FunctionModel,
    ModelMessage,
    ModelRequest,
    ModelResponse,
    ModelTurn,
    PromptedOutput,
    StepStart,
    SystemPromptPart,
    TextPart,
    ToolCallPart,
    ToolReturnPart,
    UnexpectedModelBehavior,
    UsageLimitExceeded,
    UsageLimits,
    UserError,
    UserPromptPart,
)
from dspark_agent.compaction import SUMMARY_REQUEST, first_kept, new_index, shortened
from dspark_agent.models.chat import chat_messages


def words(messages: Sequence[ModelMessage]) -> int:
    return sum(len(str(getattr(p, "content", "")).split()) for m in messages for p in m.parts)


class Small:
    """A model with a window of ``window`` words; it looks something up before it answers."""

    def __init__(self, window: int, *, summary: str = "what matters") -> None:
        self.window = window
        self.summary = summary
        self.answer_text = ""
        self.heard: list[list[ModelMessage]] = []
        self.model = FunctionModel(self.answer)

    def answer(self, messages: list[ModelMessage], turn: ModelTurn) -> str | ToolCallPart:
        assert_is_a_conversation(messages)
        if words(messages) > self.window:
            raise ContextLengthError(f"{words(messages)} words, the context holds {self.window}")
        self.heard.append(messages)
        last = messages[-1].parts[-1]
        if last == UserPromptPart(content=SUMMARY_REQUEST):
            return self.summary
        if turn.tools and isinstance(last, UserPromptPart):
            return ToolCallPart(tool_name="look_up", args={"what": last.content})
        return self.answer_text or f"answer {len(messages)}"


def assert_is_a_conversation(messages: Sequence[ModelMessage]) -> None:
    """What servers demand: roles in turn, each call followed by its result."""
    assert [m.kind for m in messages] == ["request", "response"] * (len(messages) // 2) + [
        "request"
    ] * (len(messages) % 2)
    open_ids: list[str | None] = []
    for entry in chat_messages(messages):
        if entry["role"] == "tool":
            open_ids.remove(entry["tool_call_id"])
        else:
            assert not open_ids, "a call was left without its result"
            open_ids = [call["id"] for call in entry.get("tool_calls", ())]
    assert not open_ids


def look_up(what: str) -> str:
    """Look it up."""
    return f"{what}: " + "fact " * 20


def agent_on(small: Small, **options: Any) -> Agent[object, str]:
    return Agent(small.model, tools=[look_up], instructions="Be brief.", **options)


pytestmark = pytest.mark.anyio


async def test_without_a_compaction_a_full_context_is_an_error() -> None:
    async with agent_on(Small(60)).session() as session:
        await session.run("one")
        await session.run("two")
        with pytest.raises(ContextLengthError):
            await session.run("three")


@pytest.mark.parametrize("told", [True, False], ids=["at a share", "by an overflow"])
async def test_a_conversation_goes_on_past_its_window(told: bool) -> None:
    small = Small(140)
    compaction = Compaction(at=0.5, window=140 if told else None, keep_turns=2, summary_tokens=8)
    events: list[AgentEvent] = []
    agent = agent_on(small, compaction=compaction)
    async with agent.session(on_event=events.append) as session:
        results = [await session.run(f"question {n}") for n in range(8)]
        records = session.compactions
        history = session.history
    assert len(records) >= 2
    assert [event for event in events if isinstance(event, ContextCompacted)] == list(records)
    assert [record for result in results for record in result.compactions] == list(records)
    for record in records:
        assert record.reason == ("share" if told else "overflow")
        assert record.summary == "what matters"
        assert record.left_out
        assert record.usage.output_tokens == 2
    first = history.messages[0]
    assert first.parts[0] == SystemPromptPart(content="Be brief.")
    assert isinstance(first.parts[1], UserPromptPart)
    left = len(records[-1].left_out)
    assert first.parts[1].content == (
        f"Summary of the conversation so far ({left} messages are left out):\nwhat matters"
    )
    requests = sum(result.usage.requests for result in results)
    assert requests == 2 * 8 + len(records)


async def test_nothing_is_lost_from_the_records() -> None:
    """Left-out messages and what remains, put together, are the whole conversation."""
    small = Small(140)
    async with agent_on(small, compaction=Compaction(summary_tokens=8)).session() as session:
        for n in range(8):
            await session.run(f"question {n}")
        whole = [m for record in session.compactions for m in record.left_out]
        whole += session.messages
    asked = [
        part.content
        for message in whole
        for part in message.parts
        if isinstance(part, UserPromptPart) and part.content.startswith("question")
    ]
    assert asked == [f"question {n}" for n in range(8)]
    answered = [p for m in whole for p in m.parts if isinstance(p, TextPart)]
    assert len(answered) == 8


async def test_a_result_that_does_not_fit_makes_room_for_itself() -> None:
    """In the middle of a run: the call stays with its result, and tools are not run again."""
    small = Small(120)
    ran: list[str] = []

    def look_up(what: str) -> str:
        """Look it up."""
        ran.append(what)
        return "fact " * 60

    agent = Agent(
        small.model, tools=[look_up], compaction=Compaction(keep_turns=1, summary_tokens=8)
    )
    async with agent.session() as session:
        await session.run("one")
        result = await session.run("two")
    assert ran == ["one", "two"]
    (record,) = result.compactions
    assert record.step == 3
    assert [part.part_kind for m in result.new_messages() for part in m.parts][-4:] == [
        "user-prompt", "tool-call", "tool-return", "text",
    ]  # fmt: skip


async def test_what_is_too_long_by_itself_stays_an_error() -> None:
    small = Small(90)
    async with agent_on(small, compaction=Compaction(summary_tokens=8)).session() as session:
        with pytest.raises(ContextLengthError):
            await session.step("word " * 100, tools=[])
        assert session.compactions == ()
        assert session.messages == ()
        await session.run("one")
        with pytest.raises(ContextLengthError):
            await session.step("word " * 100, tools=[])
        assert len(session.compactions) == 1


async def test_a_summary_of_ones_own_costs_no_request() -> None:
    seen: list[Sequence[ModelMessage]] = []

    async def summarise(messages: Sequence[ModelMessage]) -> str:
        seen.append(messages)
        return f"{len(messages)} messages"

    small = Small(140)
    agent = agent_on(small, compaction=Compaction(summarise=summarise))
    async with agent.session() as session:
        for n in range(6):
            await session.run(f"question {n}")
        assert session.usage.requests == 12
        assert [record.left_out for record in session.compactions] == seen
        assert session.compactions[0].summary == f"{len(seen[0])} messages"


@pytest.mark.parametrize(
    ("compaction", "summary", "error", "says"),
    [
        (Compaction(), " ", UnexpectedModelBehavior, "wrote no summary"),
        (Compaction(summarise=lambda m: 3), "", UserError, "returned 3"),  # type: ignore[arg-type,return-value]
    ],
)
async def test_a_summary_that_is_none_ends_the_step_and_leaves_the_session(
    compaction: Compaction, summary: str, error: type[Exception], says: str
) -> None:
    async with agent_on(Small(100, summary=summary), compaction=compaction).session() as session:
        for n in range(3):
            await session.run(f"question {n}")
        before = session.messages
        with pytest.raises(error, match=says):
            await session.run("question 3")
        assert session.messages[: len(before)] == before
        assert session.compactions == ()


async def test_a_summary_counts_against_the_limits() -> None:
    agent = agent_on(Small(200), compaction=Compaction(at=0.1, window=200, summary_tokens=8))
    async with agent.session(limits=UsageLimits(request_limit=4)) as session:
        await session.run("one")
        with pytest.raises(UsageLimitExceeded, match="request_limit"):
            await session.run("two")


async def test_a_mark_from_before_is_gone_back_to_in_a_new_model_session() -> None:
    small = Small(140)
    async with agent_on(small, compaction=Compaction(summary_tokens=8)).session() as session:
        await session.run("zero")
        mark, messages = session.mark(), session.messages
        while not session.compactions:
            await session.run("more")
        await session.rollback(mark)
        assert session.messages == messages
        assert session.compactions == ()
        await session.step("again", tools=[])
        assert small.heard[-1][: len(messages)] == list(messages)


async def test_a_format_that_was_left_out_is_said_again() -> None:
    small = Small(100, summary='{"n": 1}')
    small.answer_text = '{"n": 1}'
    agent = Agent(
        small.model,
        output_type=PromptedOutput(dict[str, int], template="FORMAT {schema}"),
        compaction=Compaction(keep_turns=1, summary_tokens=8),
    )
    async with agent.session() as session:
        for _ in range(6):
            await session.step("word " * 20)
            prompts = [p.content for m in small.heard[-1] for p in m.parts
                       if isinstance(p, UserPromptPart)]  # fmt: skip
            assert len([text for text in prompts if text.startswith("FORMAT")]) == 1
        assert session.compactions


async def test_a_summary_that_has_no_room_is_made_of_fewer_messages() -> None:
    """The window holds the conversation, but not the request for its summary."""
    small = Small(75)
    agent = Agent(small.model, compaction=Compaction(keep_turns=1, summary_tokens=8))
    async with agent.session() as session:
        for _ in range(9):
            await session.step("word " * 8)
        first = session.compactions[0]
    assert 0 < len(first.left_out) < 2 * 6


async def test_events_say_before_which_step() -> None:
    events: list[AgentEvent] = []
    agent = agent_on(Small(140), compaction=Compaction(summary_tokens=8))
    async with agent.session(on_event=events.append) as session:
        for n in range(7):
            await session.run(f"question {n}")
    for place, event in enumerate(events):
        if isinstance(event, ContextCompacted):
            begun = next(e for e in events[place:] if isinstance(e, StepStart))
            assert begun.step == event.step


@pytest.mark.parametrize(
    "options",
    [{"at": 0}, {"at": 1.5}, {"window": 0}, {"keep_turns": 0}, {"summary_tokens": -1}],
)
def test_numbers_out_of_range_are_refused(options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(UserError, match=rf"Compaction\({name}={value}\)"):
        Compaction(**options)


@pytest.mark.parametrize(
    ("tokens", "window", "due"),
    [(80, 100, False), (81, 100, True), (10_000, None, False)],
)
def test_it_is_due_past_its_share(tokens: int, window: int | None, due: bool) -> None:
    assert Compaction(summary_tokens=10).is_due(tokens, window) is due
    assert not Compaction(summary_tokens=10, window=100_000).is_due(tokens, window)


def test_room_for_the_summary_is_left() -> None:
    assert Compaction(at=1.0, summary_tokens=40).is_due(21, 100)


@st.composite
def conversations(draw: st.DrawFn) -> list[ModelMessage]:
    """Questions, each answered after some calls, as a session writes them down."""
    messages: list[ModelMessage] = []
    waiting: list[Any] = [SystemPromptPart(content="s")]
    for n in range(draw(st.integers(1, 5))):
        messages.append(ModelRequest(parts=(*waiting, UserPromptPart(content=f"q{n}"))))
        for _ in range(draw(st.integers(0, 3))):
            call = ToolCallPart(tool_name="t")
            messages.append(ModelResponse(parts=(call,)))
            returned = ToolReturnPart(tool_name="t", content=1, tool_call_id=call.tool_call_id)
            messages.append(ModelRequest(parts=(returned,)))
        messages.append(ModelResponse(parts=(TextPart(content=f"a{n}"),)))
        waiting = []
    return messages[: draw(st.integers(1, len(messages)))]


@given(conversations(), st.integers(1, 4))
def test_what_stays_is_a_conversation_with_the_last_turns(
    messages: list[ModelMessage], keep: int
) -> None:
    kept = first_kept(messages, keep)
    turns = [m for m in messages if isinstance(m, ModelResponse)]
    if kept is None:
        assert len(turns) < 2
        return
    left = shortened(messages, kept, "sum")
    assert [m for m in left if isinstance(m, ModelResponse)] == turns[-min(keep, len(turns) - 1) :]
    closed = left if isinstance(left[-1], ModelRequest) else left[:-1]
    assert_is_a_conversation(closed)
    assert left[0].parts[0] == SystemPromptPart(content="s")
    for index in range(kept, len(messages)):
        assert left[new_index(messages, kept, index)].parts[-1] == messages[index].parts[-1]
    assert new_index(messages, kept, 0) == new_index(messages, kept, kept)
