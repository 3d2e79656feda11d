"""The 0.5B model writes a file again that it has read: nearly all of it is copied."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dspark_backend.bench.jsonl import shipped
from dspark_backend.bench.steps import given_tokens, turn_spec
from dspark_backend.bench.trace import read_trace
from dspark_backend.engine import Engine
from dspark_backend.request import StepOutcome, StepRequest
from dspark_backend.speculation.policies import Fixed

pytestmark = pytest.mark.slow

MODEL = "qwen2.5-coder-0.5b"


@pytest.fixture(scope="module")
def plain() -> Iterator[Engine]:
    with Engine.load(MODEL, speculation=False, max_context=2048) as engine:
        yield engine


@pytest.fixture(scope="module")
def whole() -> Iterator[Engine]:
    """Up to twelve tokens of every offer: what a pass costs on a busy machine may speak against
    copies."""
    with Engine.load(MODEL, max_context=2048, policy=Fixed(12)) as engine:
        yield engine


def edited(engine: Engine) -> list[StepOutcome]:
    """The reading and the writing of the trace's first file."""
    run, *_ = read_trace(shipped("traces", "file-editing"))
    outcomes = []
    with engine.open_session() as session:
        for index, step in enumerate(run.steps[:2]):
            spec = turn_spec(run, step)
            assert spec is not None
            request = StepRequest(
                given_tokens(engine.dialect, run, index, closed=True),
                step.max_new_tokens,
                grammar=engine.compile(spec),
                kind=spec.kind,
            )
            outcomes.append(engine.step(session, request))
    return outcomes


def test_a_file_that_was_read_is_copied_into_a_call(plain: Engine, whole: Engine) -> None:
    expected, outcomes = edited(plain), edited(whole)
    assert [o.token_ids for o in outcomes] == [o.token_ids for o in expected]
    written = outcomes[1]
    assert "image: workshop/catalogue\\n    port: 8082" in written.text
    assert written.metrics.accepted["copy"] > 0.75 * len(written.token_ids)
    assert written.metrics.cycles < len(written.token_ids) / 6
