"""The arbiter in the engine's loop: any mix of copies, spans and budgets writes the plain text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dspark_backend.catalog import ModelFiles
from dspark_backend.catalog.models import open_checkpoint
from dspark_backend.engine import Engine
from dspark_backend.parts import Parts
from dspark_backend.request import ForcedMode, SamplingParams, StepOutcome, StepRequest
from dspark_backend.sampling.verifier import HostVerifier
from dspark_backend.scheduler import Limits
from dspark_backend.speculation import arbiter as arbiters
from dspark_backend.speculation.copy import CopyProposer
from dspark_backend.speculation.cost import CostModel
from dspark_backend.speculation.cost_table import CostTable
from dspark_backend.speculation.signals import Signals
from dspark_backend.target.load import load_decoder
from dspark_backend.target.precision import Precision

# Rows for nothing: whatever is proposed pays, so that as much as possible is verified.
CHEAP = CostTable(
    context=64, rows=(1, 8, 64), verify_s=(1e-2, 1.01e-2, 1.1e-2),
    request_s=0.0, position_s=0.0, pair_s=0.0, anchors=(), draft_s=(),
)  # fmt: skip
# Text that repeats itself, with a break in it.
PROMPTS = [tuple([*range(5, 25 + i)] * 3 + [3, *range(7, 20)]) for i in range(8)]
SAMPLINGS = {
    "greedy": SamplingParams(),
    "coupled": SamplingParams(temperature=0.9, seed=4),
    "penalised": SamplingParams(temperature=0.7, repetition_penalty=1.2, top_k=50, seed=1),
}


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


def written(made: Engine, steps: list[StepRequest]) -> list[StepOutcome]:
    """All at once, so that blocks of different lengths share passes."""
    sessions = [made.open_session() for _ in steps]
    handles = [made.submit(s, step) for s, step in zip(sessions, steps, strict=True)]
    outcomes = [handle.result(60) for handle in handles]
    for session in sessions:
        session.close()
    return outcomes


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_copies_write_the_plain_text(plain: Engine, fast: Engine, sampling: SamplingParams) -> None:
    steps = [StepRequest(p, 30, sampling, ignore_eos=True) for p in PROMPTS]
    expected = written(plain, steps)
    outcomes = written(fast, steps)
    assert [o.token_ids for o in outcomes] == [o.token_ids for o in expected]
    assert sum(o.metrics.proposed.get("copy", 0) for o in outcomes) > 20
    assert all(o.metrics.proposed.get("copy", 0) == 0 for o in expected)


@pytest.mark.parametrize("forced", list(ForcedMode))
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_copies_and_forced_spans_write_the_plain_text(
    plain: Engine, fast: Engine, sampling: SamplingParams, forced: ForcedMode
) -> None:
    source = 'start: ("call " /[a-c]{1,2}/ " with the same words; "){4} "stop."'

    def steps(made: Engine) -> list[StepRequest]:
        grammar = made.dialect.compiler.compile_lark(source)
        return [StepRequest(p, 200, sampling, grammar, forced) for p in PROMPTS]

    expected = written(plain, steps(plain))
    outcomes = written(fast, steps(fast))
    assert [o.token_ids for o in outcomes] == [o.token_ids for o in expected]
    assert all(o.text.endswith("stop.") for o in outcomes)
    cycles = [sum(o.metrics.cycles for o in side) for side in (outcomes, expected)]
    assert cycles[0] <= cycles[1]
    if forced is not ForcedMode.CANONICAL:
        assert cycles[0] < cycles[1]  # the second call repeats the first one's words


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_length_ends_a_copy(plain: Engine, fast: Engine, count: int) -> None:
    steps = [StepRequest(p, count, ignore_eos=True) for p in PROMPTS[:3]]
    assert [o.token_ids for o in written(fast, steps)] == [
        o.token_ids for o in written(plain, steps)
    ]


def test_rollback_and_fork_keep_the_copies_in_step(plain: Engine, fast: Engine) -> None:
    def conversation(made: Engine) -> list[tuple[int, ...]]:
        texts = []
        with made.open_session() as session:
            texts.append(made.step(session, StepRequest(PROMPTS[0], 20, ignore_eos=True)))
            session.rollback(15)
            texts.append(made.step(session, StepRequest((9, 10), 20, ignore_eos=True)))
            with session.fork() as twin:
                texts.append(made.step(twin, StepRequest((5, 6, 7), 25, ignore_eos=True)))
            texts.append(made.step(session, StepRequest((8, 9), 25, ignore_eos=True)))
        return [outcome.token_ids for outcome in texts]

    assert conversation(fast) == conversation(plain)


def test_every_cycle_is_accounted_for(fast: Engine) -> None:
    (outcome,) = written(fast, [StepRequest(PROMPTS[0], 30, ignore_eos=True, explain=True)])
    accounts = outcome.cycles
    assert len(accounts) == outcome.metrics.cycles
    assert sum(account.written for account in accounts) == 30
    at = len(PROMPTS[0])
    for account in accounts:
        assert account.position == at
        at += account.written
        assert account.accepted <= account.verified <= len(account.tokens)
        assert len(account.tokens) == len(account.sources) == len(account.survival)
        assert account.written == account.accepted + 1 or account is accounts[-1]
        assert account.predicted_s is not None
        assert account.verify_s > 0
        assert account.reason
    assert any("pays" in account.reason for account in accounts)
    assert written(fast, [StepRequest(PROMPTS[0], 5, ignore_eos=True)])[0].cycles == ()


def test_the_cost_model_sees_the_cycles(files: ModelFiles) -> None:
    cost = CostModel(CHEAP)
    with engine(files, cost=cost) as made:
        written(made, [StepRequest(PROMPTS[0], 30, ignore_eos=True)])
    assert cost.median_error is not None


def test_a_proposer_that_raises_costs_speed_only(
    plain: Engine, fast: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    steps = [StepRequest(p, 20, ignore_eos=True) for p in PROMPTS[:2]]
    expected = [o.token_ids for o in written(plain, steps)]

    def broken(*args: object, **options: object) -> None:
        raise RuntimeError("lost its place")

    monkeypatch.setattr(CopyProposer, "propose", broken)
    assert [o.token_ids for o in written(fast, steps)] == expected
    assert "copying failed" in caplog.text


def test_a_policy_that_raises_costs_speed_only(
    plain: Engine, fast: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    steps = [StepRequest(p, 20, ignore_eos=True) for p in PROMPTS[:2]]
    expected = [o.token_ids for o in written(plain, steps)]

    def broken(*args: object, **options: object) -> None:
        raise RuntimeError("cannot decide")

    monkeypatch.setattr(arbiters.StepAware, "lengths", broken)
    assert [o.token_ids for o in written(fast, steps)] == expected
    assert "no budget" in caplog.text


@pytest.mark.parametrize("off", ["copies", "splice", "calibration"])
def test_signals_change_no_token(plain: Engine, files: ModelFiles, off: str) -> None:
    steps = [StepRequest(p, 30, ignore_eos=True) for p in PROMPTS[:3]]
    expected = [o.token_ids for o in written(plain, steps)]
    with engine(files, cost=CostModel(CHEAP), signals=Signals(**{off: False})) as made:
        outcomes = written(made, steps)
    assert [o.token_ids for o in outcomes] == expected
    copied = sum(o.metrics.proposed.get("copy", 0) for o in outcomes)
    assert (copied > 0) is (off != "copies")
