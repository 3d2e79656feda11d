"""What sessions copy from beside their own log: quoted text, and what their agent did elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dspark_backend.catalog import ModelFiles
from dspark_backend.catalog.models import open_checkpoint
from dspark_backend.engine import Engine
from dspark_backend.parts import Parts
from dspark_backend.request import ForcedMode, StepKind, StepOutcome, StepRequest
from dspark_backend.sampling.verifier import HostVerifier
from dspark_backend.scheduler import Limits
from dspark_backend.session import Session
from dspark_backend.speculation.copy_acceptance import CopyAcceptance
from dspark_backend.speculation.cost import CostModel
from dspark_backend.speculation.cost_table import CostTable
from dspark_backend.speculation.memory import AGENTS, LIMIT_TOKENS
from dspark_backend.speculation.signals import Signals
from dspark_backend.target.load import load_decoder
from dspark_backend.target.precision import Precision

# Rows for nothing: whatever is proposed pays.
CHEAP = CostTable(
    context=64, rows=(1, 8, 64), verify_s=(1e-2, 1.01e-2, 1.1e-2),
    request_s=0.0, position_s=0.0, pair_s=0.0, anchors=(), draft_s=(),
)  # fmt: skip
PROMPT = tuple(range(20, 60))
FILE = 'first = "one"\nsecond = "two"\n\nthird = "three"\n'
INSIDE = json.dumps(FILE)[1:-1]


@pytest.fixture(scope="module")
def files(tiny_checkpoint: Callable[..., Path]) -> ModelFiles:
    return open_checkpoint("tiny", tiny_checkpoint("qwen3"))


def engine(files: ModelFiles, *, cost: CostModel | None, **options: Any) -> Engine:
    decoder = load_decoder(files, Precision.INT8, 512)
    parts = Parts(decoder, HostVerifier(), None, Precision.INT8)
    return Engine(files, parts, 1, 2**28, Limits(), cost=cost, **options)


@pytest.fixture(scope="module")
def plain(files: ModelFiles) -> Iterator[Engine]:
    with engine(files, cost=None) as made:
        yield made


@pytest.fixture
def fast(files: ModelFiles) -> Iterator[Engine]:
    with engine(files, cost=CostModel(CHEAP)) as made:
        yield made


def say(made: Engine, session: Session) -> StepOutcome:
    return made.step(session, StepRequest(PROMPT, 40, ignore_eos=True))


def copied(outcome: StepOutcome) -> int:
    return outcome.metrics.accepted.get("copy", 0)


def test_a_session_copies_from_an_earlier_call_of_its_agent(plain: Engine, fast: Engine) -> None:
    with plain.open_session() as session:
        expected = say(plain, session).token_ids
    with fast.open_session("coder") as first, fast.open_session("coder") as second:
        alone, again = say(fast, first), say(fast, second)
    with fast.open_session("coder") as third:  # the others are closed by now
        later = say(fast, third)
    with fast.open_session("writer") as other, fast.open_session() as nobody:
        strangers = [say(fast, other), say(fast, nobody)]
    outcomes = [alone, again, later, *strangers]
    assert all(outcome.token_ids == expected for outcome in outcomes)
    assert min(copied(again), copied(later)) > 30
    assert max(map(copied, [alone, *strangers])) < 10
    assert again.metrics.cycles < alone.metrics.cycles / 3


def test_sessions_of_nobody_share_nothing(fast: Engine) -> None:
    with fast.open_session() as first, fast.open_session() as second:
        say(fast, first)
        assert first.memory.corpus is not second.memory.corpus
        assert first.memory.corpus.held_tokens == 0
        with first.fork() as twin:
            assert twin.memory is first.memory


def test_what_was_rolled_back_is_not_kept_twice(fast: Engine) -> None:
    with fast.open_session("coder") as session:
        outcome = say(fast, session)
        whole = len(PROMPT) + len(outcome.token_ids)
        assert session.memory.corpus.held_tokens == whole
        session.rollback(len(outcome.token_ids))
        fast.step(session, StepRequest((7, 8, 9), 5, ignore_eos=True))
        assert session.memory.corpus.held_tokens == whole + 8


def test_memory_is_bounded(files: ModelFiles) -> None:
    with engine(files, cost=CostModel(CHEAP)) as made:
        corpora = []
        for number in range(AGENTS + 1):
            with made.open_session(number) as session:
                corpora.append(session.memory.corpus)
        with made.open_session(AGENTS) as last, made.open_session(0) as first:
            assert last.memory.corpus is corpora[-1]
            assert first.memory.corpus is not corpora[0]  # asked for longest ago, forgotten
        with made.open_session("busy") as session:
            session.memory.keep([3] * (LIMIT_TOKENS + 1000))
            assert session.memory.corpus.held_tokens == LIMIT_TOKENS


def test_without_copies_nothing_is_kept(files: ModelFiles) -> None:
    signals = Signals(copies=False)
    with (
        engine(files, cost=CostModel(CHEAP), signals=signals) as made,
        made.open_session("coder") as session,
    ):
        say(made, session)
        assert session.memory.corpus.held_tokens == 0


@pytest.mark.parametrize("kind", list(StepKind))
def test_what_was_read_is_copied_as_json_writes_it(fast: Engine, kind: StepKind) -> None:
    encode = fast.tokenizer.encode_plain
    first, *others = [encode(json.dumps(line)[1:-1]) for line in FILE.splitlines(keepends=True)]
    with fast.open_session() as session:
        fast.prefill(session, encode(FILE)).result()
        fast.prefill(session, first).result()
        proposal = session.copies(CopyAcceptance(), kind).propose(kind=kind)
    expected = [token for line in others for token in line]
    quoted = [*proposal.tokens] == expected[: len(proposal.tokens)]
    assert quoted == (kind is not StepKind.TEXT)
    assert len(proposal.tokens) > 10 or not quoted


@pytest.mark.parametrize("forced", list(ForcedMode))
def test_quoted_copies_write_the_plain_text(
    plain: Engine, fast: Engine, forced: ForcedMode
) -> None:
    lines = [json.dumps(line)[1:-1] for line in FILE.splitlines(keepends=True)]
    source = "start: " + " ".join(f"({json.dumps(line)} /[x-z]?/)" for line in lines)
    read = tuple(plain.tokenizer.encode_plain(FILE))

    def call(made: Engine) -> StepOutcome:
        grammar = made.dialect.compiler.compile_lark(source)
        step = StepRequest(read, 200, grammar=grammar, forced=forced, kind=StepKind.TOOL_CALL)
        with made.open_session() as session:
            return made.step(session, step)

    expected, outcome = call(plain), call(fast)
    assert outcome.token_ids == expected.token_ids
    if forced is ForcedMode.OFF:
        assert copied(outcome) > 0
        assert outcome.metrics.cycles < expected.metrics.cycles
