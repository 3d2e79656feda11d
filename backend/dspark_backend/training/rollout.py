"""The target's own answers to the prompts: what a drafter learns from (DSPARK.md, section 4).

Kept as token ids only, a JSON object a line, in the order of completion. An interrupted run goes
on where it stopped: answers depend on the prompt and the settings, not on what shares the batch.
"""

from __future__ import annotations

import json
import queue
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dspark_backend.engine import Engine
from dspark_backend.errors import BackendError, ContextLengthError, GrammarError, RequestError
from dspark_backend.events import Failed, Finished, StepEvent
from dspark_backend.grammar.compile import Grammar
from dspark_backend.grammar.spec import TurnSpec
from dspark_backend.request import SamplingParams, StepKind, StepRequest
from dspark_backend.session import Session
from dspark_backend.training.errors import TrainingError
from dspark_backend.training.prompts import Prompt


@dataclass(frozen=True, slots=True)
class Rollout:
    """A prompt and the target's answer, as token ids; ``kind`` is what the step was."""

    key: str
    source: str
    kind: StepKind
    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.prompt + self.answer


@dataclass(frozen=True, slots=True)
class RolloutConfig:
    """How answers are written.

    ``temperature`` and ``top_p``: the target's recommended sampling; ``sessions`` answers are
    written at once; prompts above ``max_prompt_tokens`` are left out, answers end at
    ``max_answer_tokens``. Of the prompts with tools, the share ``constrained`` is answered under
    the turn's grammar (a call is required), the others freely.
    """

    temperature: float = 0.7
    top_p: float = 1.0
    max_prompt_tokens: int = 512
    max_answer_tokens: int = 256
    sessions: int = 32
    constrained: float = 0.5


@dataclass(slots=True)
class RolloutReport:
    """What a run did: answers and answer tokens written, answers there already, and prompts left
    out with the reason (too long, or tools that no grammar can honour)."""

    written: int = 0
    answer_tokens: int = 0
    present: int = 0
    left_out: dict[str, str] = field(default_factory=dict)


ReportSink = Callable[[RolloutReport], None]


def read_rollouts(path: Path) -> Iterator[Rollout]:
    """The rollouts of a file; a last line that was cut off by an interruption is skipped.

    Raises:
        TrainingError: the file cannot be read, or another line is no rollout (names the line).
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise TrainingError(f"cannot read the rollouts in {path}: {error}") from error
    for number, line in enumerate(lines[:-1], start=1):
        try:
            yield _from_json(line)
        except (ValueError, KeyError, TypeError) as error:
            raise TrainingError(
                f"{path}, line {number} is no rollout ({error!r}); remove the line or the file"
            ) from error


def roll_out(
    engine: Engine,
    prompts: Sequence[Prompt],
    path: Path,
    config: RolloutConfig,
    on_progress: ReportSink | None = None,
    answer_tokens: int | None = None,
) -> RolloutReport:
    """Write the answers to ``prompts`` that ``path`` lacks; ``on_progress`` after each one.

    With ``answer_tokens`` no further answer is begun once the file holds that many answer tokens.

    Many sessions share the engine's passes. Whatever ends the run (an interrupt, an error), what
    is in the file stays usable.

    Raises:
        TrainingError: ``path`` holds something else than rollouts.
        BackendError: what a step died of.
    """
    report = RolloutReport()
    present = _mend(path)
    held = sum(present.values())
    waiting = iter([prompt for prompt in prompts if prompt.key not in present])
    report.present = sum(prompt.key in present for prompt in prompts)
    ended: queue.SimpleQueue[tuple[_Running, StepEvent]] = queue.SimpleQueue()
    running: set[_Running] = set()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("ab") as file:
            while True:
                enough = answer_tokens is not None and held + report.answer_tokens >= answer_tokens
                while not enough and len(running) < config.sessions:
                    started = _start_next(engine, waiting, config, ended, report)
                    if started is None:
                        break
                    running.add(started)
                if not running:
                    return report
                finished, event = ended.get()
                running.discard(finished)
                finished.session.close()
                if isinstance(event, Failed):
                    raise event.error
                assert isinstance(event, Finished)
                rollout = finished.rollout(event.outcome.token_ids)
                file.write(to_json(rollout))
                file.flush()
                report.written += 1
                report.answer_tokens += len(rollout.answer)
                if on_progress is not None:
                    on_progress(report)
    finally:
        for step in running:
            step.session.close()


@dataclass(frozen=True, eq=False, slots=True)
class _Running:
    prompt: Prompt
    request: StepRequest
    session: Session

    def rollout(self, answer: tuple[int, ...]) -> Rollout:
        prompt = self.prompt
        return Rollout(prompt.key, prompt.source, self.request.kind, self.request.tokens, answer)


def _start_next(
    engine: Engine,
    waiting: Iterator[Prompt],
    config: RolloutConfig,
    ended: queue.SimpleQueue[tuple[_Running, StepEvent]],
    report: RolloutReport,
) -> _Running | None:
    """Submit the next prompt that can be answered; None when there is none left."""
    for prompt in waiting:
        try:
            request = _request(engine, prompt, config)
        except (RequestError, GrammarError) as error:
            report.left_out[prompt.key] = str(error)
            continue
        running = _Running(prompt, request, engine.open_session())

        def on_event(event: StepEvent, running: _Running = running) -> None:
            if isinstance(event, Finished | Failed):
                ended.put((running, event))

        try:
            engine.submit(running.session, request, on_event)
        except BackendError as error:
            running.session.close()
            if not isinstance(error, ContextLengthError):
                raise
            report.left_out[prompt.key] = str(error)
            continue
        return running
    return None


def _request(engine: Engine, prompt: Prompt, config: RolloutConfig) -> StepRequest:
    """Raises RequestError or GrammarError where the prompt cannot be answered."""
    tokens = tuple(engine.dialect.render_start(prompt.messages, prompt.tools))
    if len(tokens) > config.max_prompt_tokens:
        raise RequestError(
            f"the prompt has {len(tokens)} tokens, max_prompt_tokens is {config.max_prompt_tokens}"
        )
    grammar = _turn_grammar(engine, prompt, config)
    return StepRequest(
        tokens=tokens,
        max_new_tokens=config.max_answer_tokens,
        # A seed of its own: the answer is the same in any batch and after any interruption.
        sampling=SamplingParams(
            config.temperature, top_p=config.top_p, seed=int(prompt.key[:8], 16)
        ),
        grammar=grammar,
        kind=StepKind.TEXT if grammar is None else StepKind.TOOL_CALL,
    )


def _turn_grammar(engine: Engine, prompt: Prompt, config: RolloutConfig) -> Grammar | None:
    # Another part of the key than the one that holds out: both splits hold both kinds.
    constrained = int(prompt.key[8:16], 16) / 2**32 < config.constrained
    if not prompt.tools or not constrained:
        return None
    return engine.compile(TurnSpec(tools=prompt.tools, tool_choice="required", allow_text=False))


def _mend(path: Path) -> dict[str, int]:
    """Answer tokens by key of the file's rollouts; a line that was cut off is taken away."""
    if not path.exists():
        return {}
    keys = {rollout.key: len(rollout.answer) for rollout in read_rollouts(path)}
    with path.open("r+b") as file:
        file.truncate(file.read().rfind(b"\n") + 1)
    return keys


def to_json(rollout: Rollout) -> bytes:
    """A line of a rollout file."""
    document = {
        "key": rollout.key,
        "source": rollout.source,
        "kind": rollout.kind.value,
        "prompt": rollout.prompt,
        "answer": rollout.answer,
    }
    return json.dumps(document, separators=(",", ":")).encode() + b"\n"


def _from_json(line: bytes) -> Rollout:
    document = json.loads(line)
    return Rollout(
        key=str(document["key"]),
        source=str(document["source"]),
        kind=StepKind(document["kind"]),
        prompt=tuple(map(int, document["prompt"])),
        answer=tuple(map(int, document["answer"])),
    )
