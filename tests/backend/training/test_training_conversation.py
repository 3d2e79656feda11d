"""Conversations of agents made for training, and playing them: one rollout each, resumable."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import jsonschema
import pytest

from dspark_backend.bench.jsonl import shipped
from dspark_backend.bench.trace import read_trace
from dspark_backend.engine import Engine
from dspark_backend.grammar.spec import TurnSpec
from dspark_backend.request import SamplingParams, StepRequest
from dspark_backend.training.agent_conversations import agent_conversations
from dspark_backend.training.conversation import Conversation, Turn, play
from dspark_backend.training.rollout import read_rollouts

LAMP = {
    "type": "function",
    "function": {
        "name": "lamp",
        "description": "Switch the lamp.",
        "parameters": {
            "type": "object",
            "properties": {"state": {"enum": ["on", "off"]}},
            "required": ["state"],
            "additionalProperties": False,
        },
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"bright": {"type": "boolean"}},
    "required": ["bright"],
    "additionalProperties": False,
}


def conversation(wish: str) -> Conversation:
    return Conversation(
        "agent-lamp",
        "You switch lamps.",
        (LAMP,),
        (
            Turn(({"role": "user", "content": wish},), {"name": "lamp"}),
            Turn(({"role": "tool", "name": "lamp", "content": "done"},), schema=SCHEMA),
            Turn(({"role": "user", "content": "Thanks."},), max_new_tokens=5),
        ),
    )


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Callable[..., Path]) -> Iterator[Engine]:
    with Engine.load(tiny_checkpoint("qwen2", max_position_embeddings=2048), threads=1) as loaded:
        yield loaded


def test_a_conversation_is_one_rollout_of_all_that_follows_its_first_prompt(
    engine: Engine, tmp_path: Path
) -> None:
    path = tmp_path / "agents.jsonl"
    asked = conversation("Light!")
    assert play(engine, [asked], path, sessions=2) == 1
    (rollout,) = read_rollouts(path)
    assert rollout.key == asked.key
    assert rollout.source == "agent-lamp"
    opening = [{"role": "system", "content": asked.system}, *asked.turns[0].messages]
    assert rollout.prompt == tuple(engine.dialect.render_start(opening, [LAMP]))
    text = engine.tokenizer.decode(rollout.answer)
    assert '"name": "lamp"' in text or '"lamp"' in text
    assert "done" in text
    assert "bright" in text
    assert text.index("lamp") < text.index("done") < text.index("bright") < text.index("Thanks.")


def test_the_first_answer_is_what_the_model_writes_greedily(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "agents.jsonl"
    play(engine, [conversation("Dark!")], path)
    (rollout,) = read_rollouts(path)
    spec = TurnSpec(tools=(LAMP,), tool_choice={"name": "lamp"})
    with engine.open_session() as session:
        request = StepRequest(
            rollout.prompt, 128, sampling=SamplingParams(), grammar=engine.compile(spec)
        )
        first = engine.step(session, request).token_ids
    assert rollout.answer[: len(first)] == first


def test_what_was_played_is_not_played_again(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "agents.jsonl"
    wishes = [conversation(f"Wish {i}") for i in range(5)]
    assert play(engine, wishes[:3], path, sessions=2) == 3
    assert play(engine, wishes, path, sessions=2) == 2
    assert sorted(r.key for r in read_rollouts(path)) == sorted(each.key for each in wishes)


def test_conversations_are_many_sound_and_not_a_benchmarks() -> None:
    made = agent_conversations(300, seed=5)
    assert made == agent_conversations(300, seed=5)
    assert len({each.key for each in made}) == 300
    assert len({each.source for each in made}) >= 7
    for each in made:
        for turn in each.turns:
            spec = TurnSpec(each.tools, turn.choice, turn.schema, allow_text=turn.schema is None)
            assert spec.kind is not None
            if turn.schema is not None:
                jsonschema.Draft202012Validator.check_schema(turn.schema)
            for message in turn.messages:
                assert "{name}" not in message["content"]
    known = {
        tool["function"]["name"]
        for each in made
        for tool in each.tools
        if "repair" not in each.source
    }
    for name in ("tool-use", "extraction"):
        for run in read_trace(shipped("traces", name, ".jsonl")):
            assert not known & {tool["function"]["name"] for tool in run.tools}
            schemas = [step.output_schema for step in run.steps if step.output_schema]
            assert not any(turn.schema in schemas for each in made for turn in each.turns)
