"""Steps under a grammar that run ahead of the host: they write what the synchronous engine writes,
and a pass is under way while the host reads what came before it. Without a drafter; under Triton's
interpreter where there is no GPU."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from dspark_backend import running
from dspark_backend.ahead.device import DeviceFlights
from dspark_backend.ahead.protocol import (
    Brought,
    Masked,
    Plan,
    Start,
)
from dspark_backend.catalog import ModelFiles
from dspark_backend.engine import Engine
from dspark_backend.errors import GrammarError
from dspark_backend.grammar.bitmask import only
from dspark_backend.kernels.recording import Capture, RecordingCounts, Recordings
from dspark_backend.kv.sequence import KV
from dspark_backend.parts import device_parts
from dspark_backend.request import (
    FinishReason,
    ForcedMode,
    SamplingParams,
    StepRequest,
)
from dspark_backend.speculation.protocol import Proposal
from dspark_backend.target.batch import Batch, Rows
from dspark_backend.target.device import DeviceDecoder
from running_ahead import DEVICE, Watched, outcomes

GREEDY, COUPLED = SamplingParams(), SamplingParams(temperature=1.0, seed=11)
CALL = 'start: "call " /[a-z]{24,27}/ ", stop."'


def called(engine: Engine, **fields: Any) -> StepRequest:
    """A step under a grammar that forces what it begins and ends with."""
    grammar = engine.dialect.compiler.compile_lark(CALL)
    return StepRequest(tuple(range(10, 19)), 40, **{"grammar": grammar, **fields})


@pytest.mark.parametrize("sampling", [GREEDY, COUPLED], ids=["greedy", "coupled"])
@pytest.mark.parametrize("forced", ForcedMode)
def test_texts_are_those_of_the_synchronous_engine(
    ahead: tuple[Engine, Watched],
    synchronous: Engine,
    forced: ForcedMode,
    sampling: SamplingParams,
) -> None:
    step = called(synchronous, forced=forced, sampling=sampling)
    (expected,), (given,) = outcomes(synchronous, [step]), outcomes(ahead[0], [step])
    assert (given.token_ids, given.text) == (expected.token_ids, expected.text)
    assert given.finish_reason is expected.finish_reason is FinishReason.GRAMMAR
    assert given.text.startswith("call ")
    assert given.text.endswith(", stop.")
    assert ahead[1].asked.count("guided begin") == 1


def test_company_with_a_text_of_its_own_flies_along(
    ahead: tuple[Engine, Watched], synchronous: Engine
) -> None:
    steps = [
        called(synchronous, sampling=COUPLED),
        StepRequest(tuple(range(30, 37)), 17, replace(COUPLED, seed=2), ignore_eos=True),
        called(synchronous, forced=ForcedMode.OFF),
    ]
    expected, given = outcomes(synchronous, steps), outcomes(ahead[0], steps)
    assert [o.token_ids for o in given] == [o.token_ids for o in expected]
    assert [o.finish_reason for o in given] == [o.finish_reason for o in expected]
    assert "guided launch 3" in ahead[1].asked


def test_the_host_reads_while_a_pass_is_under_way(ahead: tuple[Engine, Watched]) -> None:
    """Each launch judges the pass before it, once what that is about has been read."""
    engine, watched = ahead
    outcomes(engine, [called(engine, sampling=COUPLED)])
    launches = sum(what.startswith("guided launch") for what in watched.asked)
    assert launches >= 2
    expected = ["begin", "launch 0"]
    for number in range(1, launches):
        expected += [f"read {number - 1}", f"launch {number}"]
    # What the grammar forces is the synchronous cycle's.
    expected += [f"read {launches - 1}", "end", f"read {launches}"]
    assert watched.asked == [f"guided {what}" for what in expected]


def test_short_spans_are_left_to_the_synchronous_cycle(
    ahead: tuple[Engine, Watched], synchronous: Engine
) -> None:
    """The pass under way writes the first of them unnoticed; nobody flies on between the others."""
    grammar = synchronous.dialect.compiler.compile_lark('start: /[a-z]{20}/ ("." /[0-9]/)~8')
    step = called(synchronous, grammar=grammar, sampling=COUPLED)
    (expected,), (given,) = outcomes(synchronous, [step]), outcomes(ahead[0], [step])
    assert given.token_ids == expected.token_ids
    assert ahead[1].asked.count("guided begin") == 1
    assert given.metrics.cycles <= expected.metrics.cycles + 1


def test_the_parts_of_a_steps_time_are_no_more_than_all_of_it(
    ahead: tuple[Engine, Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = ahead
    plainly = running.verbatim

    def slowly(*given: Any) -> Any:
        time.sleep(0.02)
        return plainly(*given)

    monkeypatch.setattr(running, "verbatim", slowly)
    (outcome,) = outcomes(engine, [called(engine, sampling=COUPLED)])
    m = outcome.metrics
    parts = m.queue_s + m.prefill_s + m.decode_s + m.grammar_s + m.draft_s + m.verify_s
    assert m.grammar_s > 0.1
    assert parts + m.overhead_s == pytest.approx(m.total_s, rel=1e-6)


def test_who_wrote_little_freely_is_waited_for(ahead: tuple[Engine, Watched]) -> None:
    engine, watched = ahead
    grammar = engine.dialect.compiler.compile_lark('start: ("call " /[a-z]{2}/ ", stop.")~4')
    outcomes(engine, [called(engine, grammar=grammar)])
    assert watched.asked == []


def test_a_step_that_is_cancelled_leaves_the_other_one(
    ahead: tuple[Engine, Watched], synchronous: Engine
) -> None:
    engine, watched = ahead
    steps = [called(synchronous, sampling=replace(COUPLED, seed=seed)) for seed in (3, 4)]
    expected = [o.token_ids for o in outcomes(synchronous, steps)]
    with engine.lock:
        sessions = [engine.open_session() for _ in steps]
        handles = [engine.submit(s, step) for s, step in zip(sessions, steps, strict=True)]
        watched.at_launch = lambda number: handles[0].cancel()
    cancelled, other = (handle.result(300) for handle in handles)
    assert cancelled.finish_reason is FinishReason.CANCELLED
    assert cancelled.token_ids == expected[0][: len(cancelled.token_ids)]
    assert other.token_ids == expected[1]
    for session in sessions:
        session.close()


def test_a_launch_that_dies_ends_its_steps_and_no_other(
    ahead: tuple[Engine, Watched], synchronous: Engine
) -> None:
    engine, watched = ahead
    step = called(synchronous, sampling=COUPLED)
    (expected,) = outcomes(synchronous, [step])

    def die(number: int) -> None:
        if number == 1:
            raise RuntimeError("out of memory")

    watched.at_launch = die
    with engine.open_session() as session, pytest.raises(RuntimeError, match="out of memory"):
        engine.step(session, step)
    watched.at_launch = lambda number: None
    assert outcomes(engine, [step])[0].token_ids == expected.token_ids


class Sequences:
    """Of a decoder of one layer; each holds a few tokens, and room for more."""

    def __init__(self, files: ModelFiles) -> None:
        target = device_parts(files, "fp32", 256, None, DEVICE).target
        assert isinstance(target, DeviceDecoder)
        self.target = target
        self.words = -(-target.config.vocab_size // 32)
        self.storage = target.storage(None, 2**21)

    def new(self, length: int) -> KV:
        kv = self.storage.new()
        kv.reserve(length + 40)
        self.target.forward(Batch([Rows(kv, range(7, 7 + length), 0)]))
        kv.length = length
        return kv

    def follow(self, kv: KV, tokens: Sequence[int]) -> list[float]:
        logits = self.target.forward(Batch([Rows(kv, tokens, 1)])).logits[0]
        kv.length += len(tokens)
        return list(logits.tolist())

    def flown(
        self, kvs: Sequence[KV], masks: Sequence[Sequence[Masked]], recordings: Recordings | None
    ) -> list[list[int]]:
        """The tokens that follow 5, 6, ... one pass after the other, one for each of ``masks``."""
        starts = [Start(kv, 5 + i, GREEDY) for i, kv in enumerate(kvs)]
        flight = DeviceFlights(self.target, None, recordings).begin_guided(starts)
        plan = Plan.plain(len(kvs))
        assert flight.launch(plan, ()).read() == Brought([], [Proposal((), (), "")] * len(kvs))
        landings = [flight.launch(plan, each) for each in masks[:-1]]
        landings.append(flight.launch(None, masks[-1]))
        brought = [landing.read() for landing in landings]
        return [[answer().next_token for answer in each.answers] for each in brought]


def test_masks_decide_what_follows_and_each_one_of_its_own_step(files: ModelFiles) -> None:
    with torch.inference_mode():
        alone = Sequences(files)
        three: Masked = (only(33, alone.words) | only(40, alone.words) | only(205, alone.words),)
        masks: list[list[Masked]] = [[three, None], [None, three], [three, three], [None, None]]
        given = alone.flown([alone.new(5), alone.new(9)], masks, None)
        for place, length in enumerate((5, 9)):
            kv, token = alone.new(length), 5 + place
            for each, chosen in zip(masks, given, strict=True):
                logits = alone.follow(kv, [token])
                legal = range(len(logits)) if each[place] is None else (33, 40, 205)
                token = max(legal, key=logits.__getitem__)
                assert chosen[place] == token


def test_a_mask_that_allows_nothing_is_its_own_steps_error(files: ModelFiles) -> None:
    with torch.inference_mode():
        alone = Sequences(files)
        nothing: Masked = (torch.zeros(alone.words, dtype=torch.int32),)
        starts = [Start(alone.new(5), 5, GREEDY), Start(alone.new(9), 6, GREEDY)]
        flight = DeviceFlights(alone.target, None).begin_guided(starts)
        flight.launch(Plan.plain(2), ())
        answers = flight.launch(None, [nothing, None]).read().answers
        with pytest.raises(GrammarError, match="mask allows no token"):
            answers[0]()
        logits = alone.follow(alone.new(9), [6])
        assert answers[1]().next_token == max(range(len(logits)), key=logits.__getitem__)


def test_recorded_passes_are_those_that_are_launched(
    files: ModelFiles, capture: Capture | None
) -> None:
    with torch.inference_mode():
        alone = Sequences(files)
        recordings = Recordings(DEVICE, capture)
        three: Masked = (only(33, alone.words) | only(40, alone.words) | only(205, alone.words),)
        masks: list[list[Masked]] = [[three, None], [None, three]] * 3
        expected = alone.flown([alone.new(5), alone.new(9)], masks, None)
        given = alone.flown([alone.new(5), alone.new(9)], masks, recordings)
    assert given == expected
    # Six passes; before them first nothing is judged, and after the last nothing is drafted.
    counts = RecordingCounts(hits=4 + 3, misses=2 + 1 + 2 + 1, recorded=2)
    assert recordings.counts == counts
