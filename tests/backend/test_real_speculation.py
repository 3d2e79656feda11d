"""Speculation on the real small model, with the drafter that ships: the same text, for less."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from pydantic import BaseModel

from dspark_backend.engine import Engine
from dspark_backend.grammar.spec import TurnSpec
from dspark_backend.request import (
    AcceptanceRule,
    SamplingParams,
    StepKind,
    StepOutcome,
    StepRequest,
)
from dspark_backend.speculation.policies import Fixed
from dspark_backend.speculation.signals import Signals

pytestmark = pytest.mark.real_model

MODEL = "smollm2-135m"
QUESTIONS = [
    "Write a Python function that reverses a string.",
    "Write a function that merges two sorted lists.",
    "What is a context manager? Answer in two sentences.",
    "Write a class for a stack with push and pop.",
    "Name three colours.",
    "Write a loop that prints the squares of 1 to 10.",
    "Explain what a hash table is.",
    "Write a function that counts the vowels in a text.",
]
SAMPLINGS = {"greedy": SamplingParams(), "coupled": SamplingParams(temperature=0.8, seed=3)}


class Book(BaseModel):
    title: str
    pages: int
    tags: list[str]


@pytest.fixture(scope="module")
def plain() -> Iterator[Engine]:
    with Engine.load(MODEL, speculation=False, max_context=1024) as engine:
        yield engine


@pytest.fixture(scope="module")
def fast() -> Iterator[Engine]:
    with Engine.load(MODEL, speculation=True, max_context=1024) as engine:
        yield engine


@pytest.fixture(scope="module")
def blocks() -> Iterator[Engine]:
    """Whole blocks of the drafter alone, whatever they cost."""
    signals = Signals.drafts_alone()
    with Engine.load(
        MODEL, speculation=True, max_context=1024, policy=Fixed(5), signals=signals
    ) as engine:
        yield engine


def prompts(engine: Engine) -> list[tuple[int, ...]]:
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [tuple(engine.dialect.render_start(chat, [])) for chat in chats]


def steps(engine: Engine, sampling: SamplingParams, *, schema: bool) -> list[StepRequest]:
    grammar, kind = None, StepKind.TEXT
    if schema:
        spec = TurnSpec(output_schema=Book.model_json_schema(), allow_text=False)
        grammar, kind = engine.compile(spec), spec.kind
    return [
        StepRequest(tokens, 48, sampling, grammar, kind=kind, explain=True)
        for tokens in prompts(engine)
    ]


def together(engine: Engine, requests: Sequence[StepRequest]) -> list[StepOutcome]:
    sessions = [engine.open_session() for _ in requests]
    handles = [engine.submit(s, r) for s, r in zip(sessions, requests, strict=True)]
    outcomes = [handle.result(120) for handle in handles]
    for session in sessions:
        session.close()
    return outcomes


@pytest.mark.parametrize("schema", [False, True], ids=["text", "schema"])
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_speculation_writes_what_plain_decoding_writes(
    plain: Engine, fast: Engine, blocks: Engine, sampling: SamplingParams, schema: bool
) -> None:
    """Alone, in a batch of eight, by the scheduler's choice and in whole blocks."""
    expected = [o.token_ids for o in together(plain, steps(plain, sampling, schema=schema))]
    lengths: Counter[int] = Counter()
    for engine in (fast, blocks):
        outcomes = together(engine, steps(engine, sampling, schema=schema))
        assert [o.token_ids for o in outcomes] == expected
        lengths.update(cycle.accepted for o in outcomes for cycle in o.cycles)
    alone = together(fast, steps(fast, sampling, schema=schema)[:1])
    assert alone[0].token_ids == expected[0]
    if not schema:
        assert set(range(4)) <= set(lengths)
        drafted = sum(o.metrics.accepted.get("dspark", 0) for o in outcomes)
        assert drafted > 20
        cycles = sum(o.metrics.cycles for o in outcomes)
        assert cycles < 0.85 * sum(map(len, expected))


@pytest.fixture
def whole() -> Iterator[Engine]:
    """Up to eight tokens of every offer, copies among them, whatever they cost: on a busy machine
    the measured cost may speak against copies."""
    with Engine.load(MODEL, speculation=True, max_context=1024, policy=Fixed(8)) as engine:
        yield engine


def test_a_text_that_is_repeated_is_copied(plain: Engine, whole: Engine) -> None:
    code = (
        "def area(width, height):\n    return width * height\n\n\ndef volume(a, b):\n    return a"
    )
    chat = [{"role": "user", "content": f"Repeat exactly:\n```python\n{code}\n```"}]
    request = StepRequest(tuple(plain.dialect.render_start(chat, [])), 60)
    (expected,), (outcome,) = together(plain, [request]), together(whole, [request])
    assert outcome.token_ids == expected.token_ids
    assert outcome.metrics.accepted.get("copy", 0) > 4
    assert outcome.metrics.cycles < 0.8 * expected.metrics.cycles


@pytest.mark.slow
def test_rejection_sampling_writes_the_targets_distribution(plain: Engine, blocks: Engine) -> None:
    """First tokens of 300 seeds, against as many of ordinary sampling: two samples of the same
    distribution differ by no more than chance (chi-squared, 4 sigmas)."""
    sampling = SamplingParams(temperature=1.0, top_k=4, acceptance=AcceptanceRule.REJECTION)
    request = StepRequest(prompts(plain)[4], 3, sampling)
    samples = []
    for engine, first_seed in ((plain, 0), (blocks, 10_000)):
        seen: Counter[tuple[int, ...]] = Counter()
        for seed in range(first_seed, first_seed + 300):
            own = replace(request, sampling=replace(sampling, seed=seed))
            with engine.open_session() as session:
                seen[engine.step(session, own).token_ids] += 1
        samples.append(seen)
    ours, theirs = samples
    texts = [text for text in ours | theirs if ours[text] + theirs[text] >= 10]
    rest = [300 - sum(sample[text] for text in texts) for sample in samples]
    pairs = [(ours[text], theirs[text]) for text in texts]
    if sum(rest) >= 10:
        pairs.append((rest[0], rest[1]))
    assert len(pairs) > 3
    chi = sum((a - b) ** 2 / (a + b) for a, b in pairs)
    freedom = len(pairs) - 1
    assert (chi - freedom) / (2 * freedom) ** 0.5 < 4.0
