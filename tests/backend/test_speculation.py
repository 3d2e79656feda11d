"""Speculation against plain decoding, with a drafter whose every acceptance length is chosen."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dspark_backend.catalog.files import ModelFiles, open_checkpoint
from dspark_backend.engine import Engine
from dspark_backend.grammar.compile import Grammar
from dspark_backend.kv.budget import KVBudget, KVShape
from dspark_backend.kv.contiguous import SequenceKV
from dspark_backend.parts import Parts
from dspark_backend.request import FinishReason, ForcedMode, SamplingParams, StepRequest
from dspark_backend.sampling.verifier import HostVerifier
from dspark_backend.scheduler import Limits
from dspark_backend.speculation.block import FORCED, Offer, constrained
from dspark_backend.speculation.candidate import BudgetPolicy
from dspark_backend.speculation.policies import Fixed
from dspark_backend.speculation.protocol import Anchor, Proposal
from dspark_backend.speculation.trail import Trail
from dspark_backend.target.batch import Batch, Rows
from dspark_backend.target.decoder import Decoder
from dspark_backend.target.load import load_decoder
from dspark_backend.target.precision import Precision

BLOCK = 5
PROMPTS = [tuple(range(10 + 7 * i, 40 + 9 * i)) for i in range(8)]
SAMPLINGS = {
    "greedy": SamplingParams(),
    "coupled": SamplingParams(temperature=1.0, seed=11),
    "penalised": SamplingParams(temperature=0.7, seed=3, top_k=40, repetition_penalty=1.3),
}


class ScriptedDrafter:
    """Drafts the true continuation of texts it was told, wrong from a chosen place on.

    Its context keeps the first feature of every position, so a context that was not written, or
    written from other tokens, matches no text: that is an error here, and makes the test fail.
    """

    taps = (0,)
    block_size = BLOCK
    context_shape = KVShape(layers=1, kv_heads=1, head_dim=1)

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._texts: list[tuple[list[int], NDArray[np.float32]]] = []
        self.right: Callable[[int], int] = lambda position: BLOCK
        self.problems: list[str] = []
        self.blocks = 0

    def learn(self, text: Sequence[int]) -> None:
        kv = SequenceKV(self._decoder.kv_shape, KVBudget(2**40))
        kv.reserve(len(text))
        features = self._decoder.forward(Batch([Rows(kv, text, 0)]), self.taps).features[:, 0]
        self._texts.append((list(text), features.numpy().copy()))

    def extend(self, context: SequenceKV, features: torch.Tensor) -> None:
        start = context.length
        context.keys[0, 0, start : start + len(features), 0] = features[:, 0].numpy()
        context.length = start + len(features)

    def propose(self, anchors: Sequence[Anchor]) -> list[Proposal]:
        self.blocks += len(anchors)
        return [self._propose(anchor) for anchor in anchors]

    def _propose(self, anchor: Anchor) -> Proposal:
        at = anchor.context.length
        seen = anchor.context.keys[0, 0, :at, 0]
        for text, features in self._texts:
            if np.array_equal(seen, features[:at]) and text[at] == anchor.token:
                block = text[at + 1 : at + 1 + BLOCK]
                known = len(anchor.known)
                if block[:known] != list(anchor.known):
                    continue
                right = max(self.right(at), known)
                drafts = block[known:right] + [(token + 1) % 384 for token in block[right:]]
                return Proposal(tuple(drafts), (1.0,) * len(drafts), "script")
        self.problems.append(f"no text has this context of {at} positions")
        return Proposal((), (), "script")


def cpu(decoder: Decoder, drafter: ScriptedDrafter | None = None) -> Parts:
    return Parts(decoder, HostVerifier(), drafter, Precision.INT8)


@pytest.fixture(scope="module")
def files(tiny_checkpoint: Callable[..., Path]) -> ModelFiles:
    return open_checkpoint("tiny", tiny_checkpoint("qwen3"))


@pytest.fixture(scope="module")
def plain(files: ModelFiles) -> Iterator[Engine]:
    decoder = load_decoder(files, Precision.INT8, 512)
    with Engine(files, cpu(decoder), 1, 2**28, Limits()) as engine:
        yield engine


class Speculative:
    def __init__(self, files: ModelFiles, policy: BudgetPolicy | None = None) -> None:
        decoder = load_decoder(files, Precision.INT8, 512)
        self.drafter = ScriptedDrafter(load_decoder(files, Precision.INT8, 512))
        parts = cpu(decoder, self.drafter)
        self.engine = Engine(files, parts, 1, 2**28, Limits(), policy)


@pytest.fixture
def speculative(files: ModelFiles) -> Iterator[Callable[..., Speculative]]:
    opened: list[Speculative] = []

    def load(policy: BudgetPolicy | None = None) -> Speculative:
        opened.append(Speculative(files, policy))
        return opened[-1]

    yield load
    for item in opened:
        item.engine.close()
        assert item.drafter.problems == []


def expected(plain: Engine, step: StepRequest, drafter: ScriptedDrafter) -> tuple[int, ...]:
    """What plain decoding writes, made known to the drafter."""
    with plain.open_session() as session:
        tokens = plain.step(session, step).token_ids
    drafter.learn([*step.tokens, *tokens])
    return tokens


def request(index: int = 0, count: int = 40, **fields: object) -> StepRequest:
    return StepRequest(PROMPTS[index], count, ignore_eos=True, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("accepted", range(BLOCK + 1))
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_every_acceptance_length_writes_the_plain_text(
    plain: Engine,
    speculative: Callable[..., Speculative],
    sampling: SamplingParams,
    accepted: int,
) -> None:
    fast = speculative()
    step = request(sampling=sampling)
    text = expected(plain, step, fast.drafter)
    fast.drafter.right = lambda position: accepted
    with fast.engine.open_session() as session:
        outcome = fast.engine.step(session, step)
    assert outcome.token_ids == text
    assert outcome.metrics.cycles == pytest.approx(1 + 39 / (accepted + 1), abs=1.01)
    assert outcome.metrics.accepted.get("script", 0) <= outcome.metrics.proposed["script"]


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_eight_sessions_with_different_lengths(
    plain: Engine, speculative: Callable[..., Speculative], sampling: SamplingParams
) -> None:
    fast = speculative()
    steps = [request(i, 20 + 3 * i, sampling=sampling) for i in range(8)]
    texts = [expected(plain, step, fast.drafter) for step in steps]
    fast.drafter.right = lambda position: position % (BLOCK + 1)
    sessions = [fast.engine.open_session() for _ in steps]
    handles = [fast.engine.submit(s, step) for s, step in zip(sessions, steps, strict=True)]
    assert [handle.result(60).token_ids for handle in handles] == texts


def grammar(engine: Engine) -> Grammar:
    source = 'start: "call " /[a-z]{2,5}/ " with number " /[0-9]{3,6}/ ", then stop."'
    return engine.dialect.compiler.compile_lark(source)


@pytest.mark.parametrize("forced", list(ForcedMode))
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("accepted", [0, 1, 3, BLOCK])
def test_grammar_and_drafts_share_a_block(
    plain: Engine,
    speculative: Callable[..., Speculative],
    sampling: SamplingParams,
    forced: ForcedMode,
    accepted: int,
) -> None:
    fast = speculative()
    step = request(sampling=sampling, grammar=grammar(plain), forced=forced, count=60)
    text = expected(plain, step, fast.drafter)
    fast.drafter.right = lambda position: accepted
    own = request(sampling=sampling, grammar=grammar(fast.engine), forced=forced, count=60)
    with fast.engine.open_session() as session:
        outcome = fast.engine.step(session, own)
    assert outcome.token_ids == text
    assert outcome.text.endswith(", then stop.")


@pytest.mark.parametrize("count", range(1, 14))
@pytest.mark.parametrize("forced", [ForcedMode.CANONICAL, ForcedMode.VERIFY])
def test_length_ends_a_block_where_it_ends_plain_text(
    plain: Engine, speculative: Callable[..., Speculative], forced: ForcedMode, count: int
) -> None:
    fast = speculative()
    step = request(grammar=grammar(plain), forced=forced, count=count)
    text = expected(plain, step, fast.drafter)
    # The drafter knows more than may be written.
    whole = request(grammar=grammar(plain), forced=forced, count=60)
    expected(plain, whole, fast.drafter)
    own = request(grammar=grammar(fast.engine), forced=forced, count=count)
    with fast.engine.open_session() as session:
        outcome = fast.engine.step(session, own)
    assert outcome.token_ids == text
    assert outcome.finish_reason is FinishReason.LENGTH or count > 8


def test_stop_token_and_stop_string_inside_an_accepted_block(
    plain: Engine, speculative: Callable[..., Speculative]
) -> None:
    fast = speculative()
    free = expected(plain, request(), fast.drafter)
    stop = free[4]
    first = free.index(stop)
    for fields in ({"stop_token_ids": (stop,)}, {"stop": (plain.tokenizer.decode(free[4:6]),)}):
        with plain.open_session() as session:
            slow = plain.step(session, request(**fields))
            log = session.tokens
        with fast.engine.open_session() as session:
            outcome = fast.engine.step(session, request(**fields))
            assert session.tokens == log
        assert (outcome.token_ids, outcome.text) == (slow.token_ids, slow.text)
        assert outcome.finish_reason is slow.finish_reason
    assert first <= 4


def test_the_next_step_goes_on_from_the_right_context(
    plain: Engine, speculative: Callable[..., Speculative]
) -> None:
    fast = speculative()
    fast.drafter.right = lambda position: position % 4
    first = expected(plain, request(), fast.drafter)
    log = PROMPTS[0] + first + (5, 6, 7)
    second = expected(plain, StepRequest(log, 20, ignore_eos=True), fast.drafter)
    with fast.engine.open_session() as session:
        assert fast.engine.step(session, request()).token_ids == first
        blocks = fast.drafter.blocks
        outcome = fast.engine.step(session, StepRequest((5, 6, 7), 20, ignore_eos=True))
        assert outcome.token_ids == second
        assert fast.drafter.blocks > blocks


def test_fork_rollback_and_prefix_hits_bring_the_draft_context_along(
    plain: Engine, speculative: Callable[..., Speculative]
) -> None:
    fast = speculative()
    text = expected(plain, request(), fast.drafter)
    with fast.engine.open_session() as session:
        fast.engine.step(session, request(count=20))
        session.rollback(10)
        rest = StepRequest((text[10],), 9, ignore_eos=True)
        twin = session.fork()
        for branch in (session, twin):
            outcome = fast.engine.step(branch, rest)
            assert outcome.token_ids == text[11:20]
            assert outcome.metrics.accepted["script"] >= 6
        twin.close()
    with fast.engine.open_session() as again:
        outcome = fast.engine.step(again, request(count=30))
        assert outcome.metrics.prefill_cached_tokens == len(PROMPTS[0]) - 1
        assert outcome.token_ids == text[:30]
        assert outcome.metrics.accepted["script"] >= 20


def test_a_beginning_computed_by_another_brings_the_draft_context_along(
    plain: Engine, speculative: Callable[..., Speculative]
) -> None:
    fast = speculative()
    shared = tuple(40 + i % 50 for i in range(300))
    steps = [StepRequest((*shared, 100 + i), 20, ignore_eos=True) for i in range(3)]
    texts = [expected(plain, step, fast.drafter) for step in steps]
    sessions = [fast.engine.open_session() for _ in steps]
    with fast.engine.lock:
        handles = [
            fast.engine.submit(session, step) for session, step in zip(sessions, steps, strict=True)
        ]
    for handle, text in zip(handles, texts, strict=True):
        assert handle.result().token_ids == text
        assert handle.result().metrics.accepted["script"] > 10
    assert [handle.result().metrics.prefill_new_tokens for handle in handles] == [301, 1, 1]
    for session in sessions:
        session.close()


def test_a_prefill_and_an_eviction_bring_the_draft_context_along(
    plain: Engine, speculative: Callable[..., Speculative]
) -> None:
    fast = speculative()
    text = expected(plain, request(), fast.drafter)
    fast.drafter.right = lambda position: BLOCK
    prompt = request().tokens
    with fast.engine.open_session() as session:
        fast.engine.prefill(session, prompt[:-1]).result(30)
        assert session.cached_tokens == len(prompt) - 1
        rest = StepRequest(prompt[-1:], 40, ignore_eos=True)
        assert fast.engine.step(session, rest).token_ids == text
        session.rollback(len(text) + 1)
        with fast.engine.lock:  # as admission does where memory is short
            session.kv.truncate(0)
            session.kv.trim()
        outcome = fast.engine.step(session, rest)
    assert outcome.token_ids == text
    assert outcome.metrics.prefill_cached_tokens == 0
    assert outcome.metrics.accepted["script"] > 20


def test_cancel_inside_a_block_leaves_a_usable_session(
    plain: Engine, speculative: Callable[..., Speculative]
) -> None:
    fast = speculative()
    text = expected(plain, request(count=300), fast.drafter)
    with fast.engine.open_session() as session:
        handle = fast.engine.submit(session, request(count=300))
        next(handle.events())
        handle.cancel()
        written = handle.result(30).token_ids
        assert text[: len(written)] == written
        more = StepRequest((text[len(written)],), 8, ignore_eos=True)
        start = len(written) + 1
        assert fast.engine.step(session, more).token_ids == text[start : start + 8]


def test_a_drafter_that_raises_costs_speed_only(
    plain: Engine, speculative: Callable[..., Speculative], caplog: pytest.LogCaptureFixture
) -> None:
    fast = speculative()
    text = expected(plain, request(), fast.drafter)

    def broken(position: int) -> int:
        raise RuntimeError("no idea")

    fast.drafter.right = broken
    with caplog.at_level(logging.ERROR), fast.engine.open_session() as session:
        assert fast.engine.step(session, request()).token_ids == text
    assert "the drafter failed" in caplog.text


def test_a_budget_of_nothing_never_drafts(
    plain: Engine, speculative: Callable[..., Speculative]
) -> None:
    fast = speculative(Fixed(0))
    text = expected(plain, request(), fast.drafter)
    with fast.engine.open_session() as session:
        assert fast.engine.step(session, request()).token_ids == text
    assert fast.drafter.blocks == 0


def test_a_block_leaves_the_matcher_where_it_was(plain: Engine) -> None:
    matcher = grammar(plain).matcher()
    before, after = (torch.zeros(matcher.words, dtype=torch.int32) for _ in range(2))
    matcher.fill_mask(before)
    trail = Trail(matcher, canonical=True)
    offer = Offer.as_said(Proposal((1, 2, 3), (0.9, 0.8, 0.7), "script"))
    block = constrained(trail, offer, room=20)
    trail.commit([])
    matcher.fill_mask(after)
    assert torch.equal(before, after)
    assert block.masks is not None
    assert len(block.masks) == len(block.tokens) + 1
    assert set(block.sources) == {FORCED}
