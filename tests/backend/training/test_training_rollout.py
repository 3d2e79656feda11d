"""Prompts are read and split by their words; answers are resumable and depend on no neighbour."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dspark_backend.engine import Engine
from dspark_backend.request import SamplingParams, StepKind, StepRequest
from dspark_backend.training.errors import TrainingError
from dspark_backend.training.prompts import Prompt, ordered, read_prompts, split
from dspark_backend.training.rollout import RolloutConfig, read_rollouts, roll_out

TOOL = {
    "name": "read_file",
    "parameters": {"type": "object", "properties": {"path": {"type": "string", "maxLength": 8}}},
}
CONFIG = RolloutConfig(max_answer_tokens=12, sessions=3, constrained=1.0)


def prompt(text: str, **fields: object) -> Prompt:
    return Prompt.model_validate({"messages": [{"role": "user", "content": text}], **fields})


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Callable[..., Path]) -> Iterator[Engine]:
    with Engine.load(tiny_checkpoint("qwen2"), precision="int8", threads=1) as engine:
        yield engine


@pytest.fixture
def prompts() -> list[Prompt]:
    return [prompt(f"Write function number {i}.", source="code") for i in range(7)]


def test_prompts_keep_tools_and_source_and_drop_repeats(tmp_path: Path) -> None:
    line = {"source": "s", "licence": "x", "messages": [{"role": "user", "content": "a"}]}
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in (line, line, {**line, "tools": [TOOL]})))
    read = read_prompts(path)
    assert [(p.source, len(p.tools)) for p in read] == [("s", 0), ("s", 1)]


@pytest.mark.parametrize("line", ["{}", '{"messages": []}', "[1]", "not json"])
def test_a_line_that_is_no_prompt_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "a"}]}\n' + line)
    with pytest.raises(TrainingError, match="line 2"):
        read_prompts(path)


def test_the_split_is_stable_and_growing_it_only_moves_prompts_out() -> None:
    many = [prompt(str(i)) for i in range(2000)]
    training, held = split(many, 0.05)
    assert len(training) + len(held) == 2000
    assert 50 <= len(held) <= 150
    more = {p.key for p in split(reversed(many), 0.1)[1]}
    assert {p.key for p in held} < more


def test_the_named_sources_come_first() -> None:
    many = [prompt(str(i), source="code" if i % 3 == 0 else "prose") for i in range(30)]
    sources = [p.source for p in ordered(many, first=["code"])]
    assert sources == ["code"] * 10 + ["prose"] * 20


def test_every_prompt_is_answered_as_the_engine_answers_it(
    engine: Engine, prompts: list[Prompt], tmp_path: Path
) -> None:
    path = tmp_path / "rollouts.jsonl"
    report = roll_out(engine, prompts, path, CONFIG)
    rollouts = {rollout.key: rollout for rollout in read_rollouts(path)}
    assert report.written == len(rollouts) == 7
    assert report.answer_tokens == sum(len(r.answer) for r in rollouts.values())
    one = rollouts[prompts[4].key]
    assert one.prompt == tuple(engine.dialect.render_start(prompts[4].messages))
    sampling = SamplingParams(CONFIG.temperature, seed=int(prompts[4].key[:8], 16))
    with engine.open_session() as session:
        alone = engine.step(session, StepRequest(one.prompt, 12, sampling))
    assert one.answer == alone.token_ids


def test_an_interrupted_run_goes_on_and_ends_with_the_same_answers(
    engine: Engine, prompts: list[Prompt], tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    roll_out(engine, prompts, whole, CONFIG)
    lines = whole.read_bytes().splitlines(keepends=True)
    broken.write_bytes(b"".join(lines[:2]) + lines[2][:30])
    report = roll_out(engine, prompts, broken, CONFIG)
    assert (report.present, report.written) == (2, 5)
    assert sorted(broken.read_bytes().splitlines()) == sorted(whole.read_bytes().splitlines())


def test_what_stops_a_run_leaves_the_file_usable(
    engine: Engine, prompts: list[Prompt], tmp_path: Path
) -> None:
    path = tmp_path / "rollouts.jsonl"

    def interrupt(report: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        roll_out(engine, prompts, path, CONFIG, interrupt)
    assert len(list(read_rollouts(path))) == 1


def test_tool_prompts_are_answered_with_a_call_under_the_grammar(
    engine: Engine, tmp_path: Path
) -> None:
    path = tmp_path / "rollouts.jsonl"
    config = RolloutConfig(max_answer_tokens=64, constrained=1.0)
    roll_out(engine, [prompt("Read main.py", tools=[TOOL])], path, config)
    (rollout,) = read_rollouts(path)
    assert rollout.kind is StepKind.TOOL_CALL
    assert '{"name": "read_file", "arguments": {' in engine.tokenizer.decode(list(rollout.answer))


def test_prompts_that_cannot_be_answered_are_left_out_with_the_reason(
    engine: Engine, tmp_path: Path
) -> None:
    odd = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"not": {}}}}}
    bad = prompt("Call it", tools=[odd])
    long = prompt("word " * 400)
    report = roll_out(
        engine,
        [bad, long],
        tmp_path / "r.jsonl",
        RolloutConfig(max_prompt_tokens=300, constrained=1.0),
    )
    assert report.written == 0
    assert "max_prompt_tokens" in report.left_out[long.key]
    assert "not" in report.left_out[bad.key]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    path.write_bytes(b'{"key": 1}\n{}\n')
    with pytest.raises(TrainingError, match="line 1"):
        list(read_rollouts(path))
