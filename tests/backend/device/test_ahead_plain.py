"""Decoding that runs ahead of the host writes what the synchronous engine writes, whatever happens
on the way, and leaves nothing behind. Without a drafter; under Triton's interpreter where there is
no GPU."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from dspark_backend.ahead.protocol import (
    Landed,
)
from dspark_backend.ahead_loop import simple
from dspark_backend.catalog import ModelFiles
from dspark_backend.engine import Engine
from dspark_backend.errors import BackendError, RequestError
from dspark_backend.events import StepEvent, Tokens
from dspark_backend.request import (
    AcceptanceRule,
    FinishReason,
    SamplingParams,
    StepRequest,
)
from dspark_backend.sampling.device import answered
from dspark_backend.scheduler import Limits
from dspark_backend.speculation.copy_acceptance import CopyAcceptance
from dspark_backend.speculation.policies import Fixed
from dspark_backend.speculation.signals import Signals
from running_ahead import Watched, WatchedLanding, ahead_engine, outcomes

PROMPTS = [tuple(range(10 + 7 * i, 19 + 9 * i)) for i in range(3)]
SAMPLINGS = {
    "greedy": SamplingParams(),
    "coupled": SamplingParams(temperature=1.0, seed=11),
}


def request(index: int = 0, count: int = 8, **fields: Any) -> StepRequest:
    return StepRequest(PROMPTS[index], count, **{"ignore_eos": True, **fields})


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_texts_are_those_of_the_synchronous_engine(
    ahead: tuple[Engine, Watched], synchronous: Engine, sampling: SamplingParams
) -> None:
    steps = [request(i, 4 + 2 * i, sampling=sampling) for i in range(3)]
    expected = outcomes(synchronous, steps)
    given = outcomes(ahead[0], steps)
    assert [o.token_ids for o in given] == [o.token_ids for o in expected]
    assert [o.text for o in given] == [o.text for o in expected]
    assert [o.metrics.cycles for o in given] == [o.metrics.cycles for o in expected]
    assert [o.metrics.accepted for o in given] == [o.metrics.accepted for o in expected]
    assert ahead[1].most_unread == 2


def test_a_cycle_is_launched_before_the_one_before_it_was_read(
    ahead: tuple[Engine, Watched],
) -> None:
    engine, watched = ahead
    outcomes(engine, [request(count=5)])
    # The first token comes with the prompt's last row; nothing is launched in vain.
    assert watched.asked == [
        *("begin", "launch 0", "launch 1", "read 0", "launch 2", "read 1"),
        *("launch 3", "read 2", "read 3"),
    ]


def test_pages_end_on_the_way(ahead: tuple[Engine, Watched], synchronous: Engine) -> None:
    steps = [StepRequest(tuple(range(9, 71)), 5, ignore_eos=True)]  # 62, and then the next page
    expected = outcomes(synchronous, steps)
    assert [o.token_ids for o in outcomes(ahead[0], steps)] == [o.token_ids for o in expected]


def test_an_end_is_seen_a_cycle_late_and_nothing_of_that_stays(
    ahead: tuple[Engine, Watched], synchronous: Engine
) -> None:
    """A stop token, a stop string and a limit, each in company that goes on."""
    whole = outcomes(synchronous, [request(i, 9) for i in range(3)])
    written = whole[0].token_ids
    end = next(i for i in range(2, 9) if written[i] not in written[:i])
    ends = request(0, 9, stop_token_ids=(written[end],))
    stops = request(1, 9, stop=(whole[1].text[3:5],))
    steps = [ends, stops, request(2, 9)]
    expected = outcomes(synchronous, steps)
    assert [o.finish_reason for o in expected] == [
        *(FinishReason.STOP, FinishReason.STOP_STRING, FinishReason.LENGTH)
    ]
    given = outcomes(ahead[0], steps)
    for ours, theirs in zip(given, expected, strict=True):
        assert (ours.token_ids, ours.text) == (theirs.token_ids, theirs.text)
        assert ours.finish_reason == theirs.finish_reason
        assert ours.metrics.cycles == theirs.metrics.cycles
        assert ours.metrics.proposed == theirs.metrics.proposed


def test_a_session_goes_on_where_its_step_ended(
    ahead: tuple[Engine, Watched], synchronous: Engine
) -> None:
    texts = []
    for engine in (synchronous, ahead[0]):
        with engine.open_session() as session:
            first = engine.step(session, request(0, 9))
            end = first.token_ids[4]
            session.rollback(9)
            engine.step(session, StepRequest((3,), 9, stop_token_ids=(end,), ignore_eos=True))
            with session.fork() as twin:
                assert session.cached_tokens == len(session.tokens) - 1
                for branch in (session, twin):
                    engine.step(branch, StepRequest((5, 6), 4, ignore_eos=True))
                assert session.tokens == twin.tokens
            texts.append(session.tokens)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("closing", [False, True], ids=["cancelled", "closed"])
def test_a_step_that_is_cancelled_ends_and_the_other_goes_on(
    ahead: tuple[Engine, Watched], synchronous: Engine, closing: bool
) -> None:
    engine, watched = ahead
    expected = [o.token_ids for o in outcomes(synchronous, [request(i, 9) for i in range(2)])]
    with engine.lock:
        gone, stays = engine.open_session(), engine.open_session()
        handles = [engine.submit(gone, request(0, 9)), engine.submit(stays, request(1, 9))]
        watched.at_launch = lambda number: (gone.close if closing else handles[0].cancel)()
    cancelled, other = (handle.result(300) for handle in handles)
    assert cancelled.finish_reason is FinishReason.CANCELLED
    assert 0 < len(cancelled.token_ids) < 9
    assert cancelled.token_ids == expected[0][: len(cancelled.token_ids)]
    assert other.token_ids == expected[1]
    gone.close()
    stays.close()


def test_who_arrives_in_the_middle_is_taken_in(
    ahead: tuple[Engine, Watched], synchronous: Engine
) -> None:
    engine, watched = ahead
    expected = [o.token_ids for o in outcomes(synchronous, [request(0, 12), request(1, 5)])]
    handles = []
    late = engine.open_session()

    def arrive(number: int) -> None:
        if len(handles) == 0 and number == 2:
            handles.append(engine.submit(late, request(1, 5)))

    watched.at_launch = arrive
    with engine.open_session() as session:
        assert engine.step(session, request(0, 12)).token_ids == expected[0]
    assert handles[0].result(300).token_ids == expected[1]
    late.close()
    assert watched.asked.count("begin") == 3, "alone, both together, and the rest of the first"


def test_a_full_machine_does_not_wait_for_those_who_wait(
    files: ModelFiles, synchronous: Engine
) -> None:
    expected = [o.token_ids for o in outcomes(synchronous, [request(i, 5) for i in range(2)])]
    engine, watched = ahead_engine(files, Limits(running=1))
    with engine:
        given = outcomes(engine, [request(i, 5) for i in range(2)])
        assert [o.token_ids for o in given] == expected
        assert watched.most_unread == 2
    assert engine.kv_used_bytes == 0


def test_a_step_that_is_not_simple_is_waited_for_by_those_that_are(
    ahead: tuple[Engine, Watched], synchronous: Engine
) -> None:
    steps = [request(0, 6, explain=True), request(1, 4)]
    texts = [[o.token_ids for o in outcomes(engine, steps)] for engine in (synchronous, ahead[0])]
    assert texts[0] == texts[1]
    assert ahead[1].asked == []


def test_what_no_token_can_follow_is_that_steps_own_error(
    ahead: tuple[Engine, Watched], synchronous: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = ahead
    expected = outcomes(synchronous, [request(1, 7)])
    read = WatchedLanding.read

    def broken(landing: WatchedLanding) -> list[Landed]:
        landed = read(landing)
        if landing.number == 1 and len(landed) == 2:
            landed[0] = Landed(partial(answered, 0, -1, 512), landed[0].proposal)
        return landed

    monkeypatch.setattr(WatchedLanding, "read", broken)
    with engine.open_session() as first, engine.open_session() as second:
        with engine.lock:
            handles = [engine.submit(first, request(0, 7)), engine.submit(second, request(1, 7))]
        with pytest.raises(BackendError, match="no token can follow draft 0 of the block"):
            handles[0].result(300)
        assert handles[1].result(300).token_ids == expected[0].token_ids


def test_a_cycle_that_dies_ends_its_steps_and_no_other(
    ahead: tuple[Engine, Watched], synchronous: Engine
) -> None:
    engine, watched = ahead
    (expected,) = outcomes(synchronous, [request(0, 7)])

    def die(number: int) -> None:
        if number == 2:
            raise RuntimeError("out of memory")

    watched.at_launch = die
    with engine.open_session() as session:
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.step(session, request(0, 7))
        written = session.tokens[len(PROMPTS[0]) :]
        assert written == expected.token_ids[:2], "the second was still on its way"
        watched.at_launch = lambda number: None
        session.rollback(1)
        rest = engine.step(session, StepRequest(written[1:], 5, ignore_eos=True))
        assert rest.token_ids == expected.token_ids[2:]


def test_tokens_are_streamed_a_cycle_late(ahead: tuple[Engine, Watched]) -> None:
    engine, watched = ahead
    seen: list[str] = []

    def note(event: StepEvent) -> None:
        if isinstance(event, Tokens):
            seen.extend(f"token {token}" for token in event.token_ids)

    watched.at_launch = lambda number: seen.append(f"launch {number}")
    with engine.open_session() as session:
        outcome = engine.submit(session, request(0, 4), note).result(300)
    a, b, c, d = (f"token {token}" for token in outcome.token_ids)
    assert seen == [a, "launch 0", "launch 1", b, "launch 2", c, d]


@pytest.mark.parametrize(
    "fields",
    [
        {"explain": True},
        {"max_new_tokens": 0},
        *(
            {"sampling": SamplingParams(**{name: value})}
            for name, value in (
                ("top_k", 5),
                ("top_p", 0.9),
                ("min_p", 0.1),
                ("repetition_penalty", 1.1),
                ("presence_penalty", 0.5),
                ("frequency_penalty", 0.5),
                ("logit_bias", {3: 1.0}),
            )
        ),
        {"sampling": SamplingParams(temperature=1.0, acceptance=AcceptanceRule.REJECTION)},
    ],
    ids=str,
)
def test_what_needs_the_host_is_not_simple(fields: dict[str, Any]) -> None:
    assert simple(StepRequest((1,), 4, SAMPLINGS["coupled"]))
    assert simple(StepRequest((1,), 4, SamplingParams(acceptance=AcceptanceRule.REJECTION)))
    assert not simple(replace(StepRequest((1,), 4), **fields))


def test_the_cpu_is_not_run_ahead_of(files: ModelFiles) -> None:
    with pytest.raises(RequestError, match=r"ahead is a GPU's.*device='cuda', or without"):
        Engine.load(files.folder, ahead=True)


def test_what_can_be_copied_is_left_to_the_synchronous_cycle(
    files: ModelFiles, synchronous: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text that goes round in circles; it goes ahead for as long as nobody can have noticed."""
    # What experience with a real model says of long matches.
    monkeypatch.setattr(CopyAcceptance, "probability", lambda self, kind, at: 0.95)
    step = request(0, 60)
    (expected,) = outcomes(synchronous, [step])
    engine, watched = ahead_engine(files, policy=Fixed(8), signals=Signals())
    with engine:
        (given,) = outcomes(engine, [step])
    assert given.token_ids == expected.token_ids
    assert watched.asked.count("launch 20") == 1
    assert given.metrics.accepted["copy"] > 8
