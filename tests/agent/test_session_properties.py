"""Whatever happens to a session's steps, it says what a list of its completed ones would say."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_agent import (
    Agent,
    FunctionModel,
    ModelMessage,
    ModelRequest,
    ModelTurn,
    OutputError,
    Session,
    ToolCallPart,
    UserPromptPart,
)

Action = Literal["answer", "call", "refused", "broken", "cancelled", "fork", "mark", "rollback"]


@dataclass
class World:
    """One session, what it should have said, and what its model was last told."""

    session: Session[object, str]
    said: list[str] = field(default_factory=list)
    marks: list[tuple[Any, list[str]]] = field(default_factory=list)


def prompts(messages: Any) -> list[str]:
    return [
        part.content
        for message in messages
        if isinstance(message, ModelRequest)
        for part in message.parts
        if isinstance(part, UserPromptPart)
    ]


def answering(heard: list[list[str]]) -> Agent[object, str]:
    """Does what the last prompt says."""

    async def answer(messages: list[ModelMessage], turn: ModelTurn) -> str | ToolCallPart:
        heard.append(prompts(messages))
        action = heard[-1][-1].split()[0]
        if action == "cancelled":
            await anyio.sleep(60)
        if action == "call":
            return ToolCallPart(tool_name="note", args={"text": heard[-1][-1]})
        if action == "broken":
            raise ZeroDivisionError
        return "no json" if action == "refused" else "fine"

    async def note(text: str) -> str:
        """Note."""
        return text

    return Agent(FunctionModel(answer), tools=[note])


async def act(world: World, action: Action, prompt: str) -> World:
    session = world.session
    match action:
        case "answer":
            await session.step(prompt, tools=[])
            world.said.append(prompt)
        case "call":
            await session.step(prompt, tool_choice="note")
            world.said.append(prompt)
        case "refused":
            with pytest.raises(OutputError):
                await session.step(prompt, output_type=int)
        case "broken":
            with pytest.raises(ZeroDivisionError):
                await session.step(prompt)
        case "cancelled":
            with anyio.move_on_after(0.001) as scope:
                await session.step(prompt)
            assert scope.cancelled_caught
        case "fork":
            return World(await session.fork(), list(world.said))
        case "mark":
            world.marks.append((session.mark(), list(world.said)))
        case "rollback" if world.marks:
            mark, said = world.marks.pop()
            await session.rollback(mark)
            world.said = list(said)
    return world


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@given(
    st.lists(
        st.sampled_from(
            ["answer", "call", "refused", "broken", "cancelled", "fork", "mark", "rollback"]
        ),
        max_size=12,
    )
)
@settings(max_examples=60, deadline=None)
def test_a_session_says_what_its_completed_steps_said(backend: str, actions: list[Action]) -> None:
    heard: list[list[str]] = []

    async def main() -> None:
        async with answering(heard).session() as session:
            worlds = [World(session)]
            for number, action in enumerate(actions):
                world = await act(worlds[-1], action, f"{action} {number}")
                if world is not worlds[-1]:
                    worlds.append(world)
            for world in worlds:
                assert prompts(world.session.messages) == world.said
                await world.session.step("answer last", tools=[])
                assert heard[-1] == [*world.said, "answer last"]

    anyio.run(main, backend=backend)
