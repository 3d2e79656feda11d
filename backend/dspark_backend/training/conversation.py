"""Conversations of agents as training data: what comes from outside, and what each turn may emit.

The model answers for itself when a conversation is played; the whole of it is one rollout, from
the first answer on. Tool results and requests in between are part of it: a drafter that foresees
the model there as well has only more to learn from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark_backend.engine import Engine
from dspark_backend.grammar.spec import ToolChoice, ToolSchema, TurnSpec
from dspark_backend.request import SamplingParams, StepKind, StepRequest
from dspark_backend.training.rollout import Rollout, read_rollouts, to_json


@dataclass(frozen=True, slots=True)
class Turn:
    """``messages`` are appended; then the model calls a tool (``choice``), or writes an object of
    ``schema``, or text where both are left out."""

    messages: tuple[Mapping[str, Any], ...]
    choice: ToolChoice = "none"
    schema: Mapping[str, Any] | None = None
    max_new_tokens: int = 128


@dataclass(frozen=True, slots=True)
class Conversation:
    """An agent's declaration and its turns; ``source`` names its kind."""

    source: str
    system: str
    tools: tuple[ToolSchema, ...]
    turns: tuple[Turn, ...]

    @property
    def key(self) -> str:
        """The same conversation has the same key on any machine."""
        turns = [[*map(dict, turn.messages), turn.choice, turn.schema] for turn in self.turns]
        text = json.dumps([self.system, self.tools, turns], sort_keys=True, default=dict)
        return hashlib.sha256(text.encode()).hexdigest()[:24]


def play(
    engine: Engine,
    conversations: Iterable[Conversation],
    path: Path,
    sessions: int = 16,
    on_played: Callable[[Rollout], None] | None = None,
) -> int:
    """Play what ``path`` lacks, greedily, ``sessions`` conversations at a time, and append a
    rollout each; returns how many were written. Whatever ends the run, the file stays usable.

    Raises:
        TrainingError: ``path`` holds something else than rollouts.
        BackendError: what a step died of.
    """
    present = {rollout.key for rollout in read_rollouts(path)} if path.exists() else set()
    waiting = [each for each in conversations if each.key not in present]
    path.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with path.open("ab") as file, ThreadPoolExecutor(sessions) as pool:
        for rollout in pool.map(lambda each: _played(engine, each), waiting):
            file.write(to_json(rollout))
            file.flush()
            written += 1
            if on_played is not None:
                on_played(rollout)
    return written


def _played(engine: Engine, conversation: Conversation) -> Rollout:
    dialect, ends = engine.dialect, engine.tokenizer.eos_token_ids
    kind, prompt, closed = StepKind.TEXT, 0, True
    with engine.open_session() as session:
        for index, turn in enumerate(conversation.turns):
            spec = _spec(conversation.tools, turn)
            if index:
                tokens = dialect.render_next([dict(each) for each in turn.messages], closed=closed)
            else:
                opening = [{"role": "system", "content": conversation.system}, *turn.messages]
                tokens = dialect.render_start(opening, conversation.tools)
                prompt = len(tokens)
                kind = StepKind.TEXT if spec is None else spec.kind
            request = StepRequest(
                tokens=tuple(tokens),
                max_new_tokens=turn.max_new_tokens,
                sampling=SamplingParams(temperature=0.0),
                grammar=None if spec is None else engine.compile(spec),
                kind=StepKind.TEXT if spec is None else spec.kind,
            )
            new = engine.step(session, request).token_ids
            closed = bool(new) and new[-1] in ends
        log = session.tokens
    return Rollout(conversation.key, conversation.source, kind, log[:prompt], log[prompt:])


def _spec(tools: Sequence[ToolSchema], turn: Turn) -> TurnSpec | None:
    spec = TurnSpec(
        tools=tuple(tools),
        tool_choice=turn.choice,
        output_schema=turn.schema,
        allow_text=turn.schema is None,
    )
    return None if spec.kind is StepKind.TEXT else spec
