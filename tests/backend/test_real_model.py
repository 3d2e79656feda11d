"""The engine on SmolLM2-135M: what only a trained model can show."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jsonschema
import pytest
import torch
from transformers import AutoModelForCausalLM

from dspark_backend.catalog import ModelFiles
from dspark_backend.engine import Engine
from dspark_backend.grammar.spec import TurnSpec
from dspark_backend.kv.budget import KVBudget
from dspark_backend.kv.contiguous import SequenceKV
from dspark_backend.request import ForcedMode, SamplingParams, StepOutcome, StepRequest
from dspark_backend.target.batch import Batch, Rows
from dspark_backend.target.decoder import Decoder
from dspark_backend.target.load import load_decoder
from dspark_backend.target.precision import Precision

pytestmark = pytest.mark.real_model

MODEL = "smollm2-135m"
QUESTIONS = [
    "Write a Python function that reverses a string.",
    "What is the capital of France?",
    "Explain in one sentence what a stack is.",
    "Fix this line: for i in range(len(xs)) print(xs[i])",
    "Name three prime numbers.",
    "Write a haiku about the sea.",
    "Translate 'good morning' into Spanish.",
    "What does HTTP stand for?",
]
WEATHER = {
    "name": "get_weather",
    "description": "Weather of a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "unit": {"enum": ["celsius", "fahrenheit"]}},
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "languages": {"type": "array", "items": {"enum": ["Python", "C", "Rust"]}, "maxItems": 3},
    },
    "required": ["name", "age", "languages"],
    "additionalProperties": False,
}
PROSE = (
    "A scheduler decides which task runs next. A fair one makes sure that every task moves on, "
    "and a good one makes sure that the task somebody waits for moves on first. When a machine "
    "has two cores and ten tasks, the difference between the two is what people call latency.\n"
)
CODE = (
    "def moving_average(values, size):\n"
    "    if size < 1:\n"
    "        raise ValueError('size must be at least 1')\n"
    "    total = sum(values[:size])\n"
    "    result = [total / size]\n"
    "    for i in range(size, len(values)):\n"
    "        total += values[i] - values[i - size]\n"
    "        result.append(total / size)\n"
    "    return result\n"
)


@pytest.fixture(scope="module")
def engine(smollm2_files: ModelFiles) -> Iterator[Engine]:
    with Engine.load(MODEL) as loaded:
        yield loaded


def prompt(engine: Engine, question: str) -> tuple[int, ...]:
    return tuple(engine.dialect.render_start([{"role": "user", "content": question}]))


def alone(engine: Engine, step: StepRequest) -> StepOutcome:
    with engine.open_session() as session:
        return engine.step(session, step)


@pytest.mark.parametrize(
    "sampling", [SamplingParams(), SamplingParams(temperature=0.8, top_p=0.95, seed=3)],
    ids=["greedy", "sampled"],
)  # fmt: skip
def test_a_batch_of_eight_writes_what_each_writes_alone(
    engine: Engine, sampling: SamplingParams
) -> None:
    steps = [StepRequest(prompt(engine, q), 16, sampling) for q in QUESTIONS]
    expected = [alone(engine, step).token_ids for step in steps]
    sessions = [engine.open_session() for _ in steps]
    handles = [engine.submit(s, step) for s, step in zip(sessions, steps, strict=True)]
    assert [handle.result(120).token_ids for handle in handles] == expected
    for session in sessions:
        session.close()


@pytest.mark.parametrize("schema", [PERSON, WEATHER["parameters"]], ids=["person", "weather"])
def test_typed_results_validate_in_every_forced_mode(
    engine: Engine, schema: dict[str, Any]
) -> None:
    grammar = engine.compile(TurnSpec(output_schema=schema, allow_text=False))
    question = prompt(engine, "Ada is 36, from Paris, and writes Python and C. Answer in JSON.")
    outcomes = {
        mode: alone(engine, StepRequest(question, 80, grammar=grammar, forced=mode))
        for mode in ForcedMode
    }
    for outcome in outcomes.values():
        jsonschema.validate(json.loads(outcome.text), schema)
    plain, verified = outcomes[ForcedMode.OFF], outcomes[ForcedMode.VERIFY]
    assert verified.token_ids == plain.token_ids
    assert outcomes[ForcedMode.CANONICAL].metrics.cycles < plain.metrics.cycles


def test_a_tool_call_takes_few_passes_and_parses(engine: Engine) -> None:
    spec = TurnSpec(tools=(WEATHER,), tool_choice={"name": "get_weather"})
    messages = [{"role": "user", "content": "What is the weather in Paris, in celsius?"}]
    tokens = tuple(engine.dialect.render_start(messages, [WEATHER]))
    outcome = alone(engine, StepRequest(tokens, 80, grammar=engine.compile(spec)))
    (call,) = engine.dialect.parse(outcome.text, spec).tool_calls
    jsonschema.validate(call.arguments, WEATHER["parameters"])
    assert outcome.metrics.cycles * 2 < len(outcome.token_ids)


def logits_of(decoder: Decoder, tokens: Sequence[int], cut: int) -> torch.Tensor:
    kv = SequenceKV(decoder.kv_shape, KVBudget(2**40))
    kv.reserve(len(tokens))
    parts = []
    for first in range(0, len(tokens), cut):
        piece = tokens[first : first + cut]
        parts.append(decoder.forward(Batch([Rows(kv, piece, len(piece))])).logits)
        kv.length += len(piece)
    return torch.cat(parts)


@pytest.mark.parametrize("precision", [Precision.INT8X16, Precision.INT8])
def test_one_row_or_sixteen_give_the_same_bits(
    smollm2_files: ModelFiles, precision: Precision
) -> None:
    decoder = load_decoder(smollm2_files, precision, 256)
    tokens = smollm2_files.tokenizer().encode(CODE)[:32]
    assert torch.equal(logits_of(decoder, tokens, 1), logits_of(decoder, tokens, 16))


def teacher_forced_misses(files: ModelFiles, questions: Sequence[str], count: int) -> list[float]:
    """How far below transformers' best logit our greedy tokens are, where they are not its best.

    Our text is given to transformers in bfloat16, which says at every position what it would have
    written: one early tie then costs one position, not the rest of the text.
    """
    oracle = AutoModelForCausalLM.from_pretrained(files.folder, dtype=torch.bfloat16).eval()
    misses = []
    with Engine.load(MODEL, precision="bf16") as engine:
        for question in questions:
            start = prompt(engine, question)
            new = alone(engine, StepRequest(start, count, ignore_eos=True)).token_ids
            with torch.no_grad():
                logits = oracle(torch.tensor([[*start, *new]])).logits[0].float()
            rows = logits[len(start) - 1 : -1]
            gaps = rows.max(dim=1).values - rows.gather(1, torch.tensor(new)[:, None])[:, 0]
            # bfloat16 logits of this size are apart by top / 128 at least: less is a tie.
            spacing = 2.0 ** (torch.floor(torch.log2(rows.max(dim=1).values.abs())) - 7)
            misses += [float(g) for g, s in zip(gaps, spacing, strict=True) if g > 4 * s]
    return misses


def test_bf16_writes_what_transformers_writes(smollm2_files: ModelFiles) -> None:
    assert teacher_forced_misses(smollm2_files, QUESTIONS[:2], 24) == []


@pytest.mark.slow
def test_bf16_writes_what_transformers_writes_at_length(smollm2_files: ModelFiles) -> None:
    questions = [f"{q} Answer number {n}." for q in QUESTIONS for n in range(4)]
    assert teacher_forced_misses(smollm2_files, questions, 64) == []


def perplexity(decoder: Decoder, tokens: Sequence[int]) -> float:
    logits = logits_of(decoder, tokens, 64)
    loss = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(tokens[1:]))
    return math.exp(float(loss))


def test_the_default_precision_costs_less_than_three_percent(smollm2_files: ModelFiles) -> None:
    tokens = smollm2_files.tokenizer().encode(PROSE + CODE)
    measured = {
        p: perplexity(load_decoder(smollm2_files, p, 512), tokens)
        for p in (Precision.BF16, Precision.INT8X16)
    }
    assert measured[Precision.INT8X16] <= 1.03 * measured[Precision.BF16]
