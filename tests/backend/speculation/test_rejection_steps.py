"""What ends a step, goes back or is cancelled does so in rejection sampling too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from dspark_backend.engine import Engine
from dspark_backend.errors import RequestError
from dspark_backend.request import AcceptanceRule, FinishReason, SamplingParams, StepRequest

MakeEngine = Callable[..., tuple[Engine, Any]]

PROMPT = tuple(range(20, 44))
SPOKEN = (70, 71, 72, 73, 74)
REJECTION = SamplingParams(
    temperature=1.0,
    logit_bias=dict.fromkeys(SPOKEN, 60.0),
    acceptance=AcceptanceRule.REJECTION,
)


def request(count: int, sampling: SamplingParams = REJECTION, **fields: Any) -> StepRequest:
    return StepRequest(PROMPT, count, sampling, ignore_eos=True, **fields)


@pytest.mark.parametrize("count", range(1, 9))
def test_a_step_writes_as_many_tokens_as_it_may(count: int, speculative: MakeEngine) -> None:
    engine, _ = speculative()
    for seed in range(5):
        with engine.open_session() as session:
            step = request(count, replace(REJECTION, seed=seed))
            outcome = engine.step(session, step)
            assert len(outcome.token_ids) == count
            assert session.tokens == PROMPT + outcome.token_ids
            assert outcome.finish_reason is FinishReason.LENGTH


def test_stop_tokens_and_stop_strings_end_a_block(speculative: MakeEngine) -> None:
    engine, _ = speculative()
    word = engine.tokenizer.decode([SPOKEN[2]])
    by_token = request(40, stop_token_ids=(SPOKEN[2],))
    by_string = request(40, stop=(word,))
    for seed in range(10):
        with engine.open_session() as session:
            step = replace(by_token, sampling=replace(REJECTION, seed=seed))
            outcome = engine.step(session, step)
            assert session.tokens == PROMPT + outcome.token_ids
        assert outcome.token_ids.index(SPOKEN[2]) == len(outcome.token_ids) - 1
        assert outcome.finish_reason is FinishReason.STOP
        with engine.open_session() as session:
            step = replace(by_string, sampling=replace(REJECTION, seed=seed))
            outcome = engine.step(session, step)
        assert word not in outcome.text
        assert outcome.finish_reason is FinishReason.STOP_STRING


def test_a_fork_and_a_second_run_draw_the_same(speculative: MakeEngine) -> None:
    engine, _ = speculative()
    with engine.open_session() as session:
        engine.step(session, request(10))
        twin = session.fork()
        more = StepRequest((SPOKEN[0],), 20, REJECTION, ignore_eos=True)
        outcomes = [engine.step(branch, more) for branch in (session, twin)]
        assert outcomes[0].token_ids == outcomes[1].token_ids
        twin.close()


def test_cancelling_inside_a_block_leaves_a_usable_session(speculative: MakeEngine) -> None:
    engine, _ = speculative()
    with engine.open_session() as session:
        handle = engine.submit(session, request(300))
        next(handle.events())
        handle.cancel()
        written = handle.result(30).token_ids
        assert session.tokens == PROMPT + written
        outcome = engine.step(session, StepRequest((SPOKEN[0],), 8, REJECTION, ignore_eos=True))
        assert len(outcome.token_ids) == 8


def test_at_temperature_zero_both_rules_are_greedy(speculative: MakeEngine) -> None:
    engine, _ = speculative()
    greedy = replace(REJECTION, temperature=0.0)
    written = []
    for rule in AcceptanceRule:
        with engine.open_session() as session:
            step = request(20, replace(greedy, acceptance=rule))
            written.append(engine.step(session, step).token_ids)
    assert written[0] == written[1]


def test_an_unknown_rule_is_refused(speculative: MakeEngine) -> None:
    engine, _ = speculative()
    wrong = replace(REJECTION, acceptance="hopeful")  # type: ignore[arg-type]
    with engine.open_session() as session, pytest.raises(RequestError, match="coupled, rejection"):
        engine.step(session, request(4, wrong))
