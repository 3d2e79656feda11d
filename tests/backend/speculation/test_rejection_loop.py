"""Rejection sampling in the engine's loop emits the target's distribution: chi-squared tests over
whole texts, and the known ways of getting it wrong, which the same tests catch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dspark_backend import running
from dspark_backend.catalog.files import ModelFiles
from dspark_backend.engine import Engine
from dspark_backend.errors import RequestError
from dspark_backend.grammar.bitmask import is_allowed
from dspark_backend.grammar.compile import Grammar
from dspark_backend.grammar.matcher import Matcher
from dspark_backend.kv.contiguous import KVBudget, KVShape, SequenceKV
from dspark_backend.request import (
    AcceptanceRule,
    FinishReason,
    ForcedMode,
    SamplingParams,
    StepRequest,
)
from dspark_backend.sampling import Sampler
from dspark_backend.sampling.choose import sample
from dspark_backend.sampling.noise import Noise, Stream
from dspark_backend.scheduler import Limits
from dspark_backend.speculation.block import Block, constrained
from dspark_backend.speculation.candidate import BudgetPolicy
from dspark_backend.speculation.distribution import Distribution
from dspark_backend.speculation.policies import Threshold
from dspark_backend.speculation.protocol import Anchor, Proposal
from dspark_backend.speculation.vocabulary import DraftVocabulary
from dspark_backend.target.batch import Batch, Rows
from dspark_backend.target.decoder import Decoder
from dspark_backend.target.load import load_decoder
from dspark_backend.target.precision import Precision

Sigmas = Callable[[Iterable[Any], Mapping[Any, float]], float]
Lark = Callable[[str], Grammar]
Text = tuple[int, ...]

VOCAB = 512
PROMPT = tuple(range(20, 44))
SPOKEN = (70, 71, 72, 73, 74)  # "small vocabulary": a bias leaves nothing else any probability
TRIALS = 1500
REJECTION = SamplingParams(
    temperature=1.0,
    logit_bias=dict.fromkeys(SPOKEN, 60.0),
    acceptance=AcceptanceRule.REJECTION,
)
PROCESSED = replace(
    REJECTION, temperature=0.8, top_k=4, top_p=0.95, min_p=0.01, repetition_penalty=1.02,
    presence_penalty=0.4, frequency_penalty=0.2,
)  # fmt: skip


class MarkovDrafter:
    """Logits of each slot are a fixed random function of the token before it, and so is its
    confidence: 0.9 or 0.1. ``masked`` drafts ask the guide; the others draw from a q that knows no
    grammar, of the bias alone."""

    taps = (0,)
    block_size = 4
    context_shape = KVShape(layers=1, kv_heads=1, head_dim=1)

    def __init__(self, *, masked: bool = True) -> None:
        rng = np.random.default_rng(5)
        self._logits = (1.5 * rng.standard_normal((VOCAB, VOCAB))).astype(np.float32)
        self._sure = np.where(np.arange(VOCAB) % 2, 0.9, 0.1)
        self._vocabulary = DraftVocabulary.whole(VOCAB)
        self._masked = masked
        self.seed = 0
        self.proposals: list[tuple[Anchor, Proposal]] = []

    def extend(self, context: SequenceKV, features: NDArray[np.float32]) -> None:
        context.length += len(features)

    def propose(self, anchors: Sequence[Anchor]) -> list[Proposal]:
        made = [self._masked_block(a) if self._masked else self._free_block(a) for a in anchors]
        self.proposals += zip(anchors, made, strict=True)
        return made

    def _masked_block(self, anchor: Anchor) -> Proposal:
        assert anchor.guide is not None
        last, slots, sure = (anchor.token, *anchor.known)[-1], [], []
        for _ in range(self.block_size - len(anchor.known)):
            slot = anchor.guide.choose(self._logits[last], self._vocabulary)
            if slot is None:
                break
            slots.append(slot)
            sure.append(slot.confidence(float(self._sure[last])))
            last = slot.token
        return Proposal(
            tuple(slot.token for slot in slots),
            tuple(np.cumprod(sure).tolist()),
            "markov",
            tuple(slot.mask_width for slot in slots),
            tuple(slot.forced for slot in slots),
            tuple(slot.distribution for slot in slots),
        )

    def _free_block(self, anchor: Anchor) -> Proposal:
        last, drafts, drawn = (anchor.token, *anchor.known)[-1], [], []
        for slot in range(len(anchor.known), self.block_size):
            q = np.zeros(VOCAB)
            weights = np.exp(self._logits[last, list(SPOKEN)].astype(np.float64))
            q[list(SPOKEN)] = weights / weights.sum()
            noise = Noise(self.seed, Stream.DRAFT, anchor.context.length, slot)
            last = sample(torch.from_numpy(q), noise)
            drafts.append(last)
            drawn.append(Distribution(np.arange(VOCAB, dtype=np.uint32), q))
        return Proposal(tuple(drafts), (1.0,) * len(drafts), "markov", (), (), tuple(drawn))


MakeEngine = Callable[..., tuple[Engine, MarkovDrafter]]


@pytest.fixture
def speculative(tiny_files: ModelFiles) -> Iterator[MakeEngine]:
    opened: list[Engine] = []

    def load(policy: BudgetPolicy | None = None, **options: Any) -> tuple[Engine, MarkovDrafter]:
        decoder = load_decoder(tiny_files, Precision.INT8, 512)
        drafter = MarkovDrafter(**options)
        limits = Limits(running=1 if options else 64)
        opened.append(
            Engine(tiny_files, decoder, Precision.INT8, 1, 2**28, limits, drafter, budget)
        )
        return opened[-1], drafter

    yield load
    for engine in opened:
        engine.close()


@pytest.fixture(scope="module")
def decoder(tiny_files: ModelFiles) -> Decoder:
    return load_decoder(tiny_files, Precision.INT8, 512)


def request(count: int, sampling: SamplingParams = REJECTION, **fields: Any) -> StepRequest:
    return StepRequest(PROMPT, count, sampling, ignore_eos=True, **fields)


def texts(engine: Engine, step: StepRequest, trials: int = TRIALS) -> list[Text]:
    """What the seeds 0, 1, ... write; the prompt is computed once and shared."""
    engine.step(engine.open_session(), replace(step, max_new_tokens=1))
    written = []
    for start in range(0, trials, 50):
        sessions = [engine.open_session() for _ in range(50)]
        handles = [
            engine.submit(s, replace(step, sampling=replace(step.sampling, seed=start + i)))
            for i, s in enumerate(sessions)
        ]
        written += [handle.result(60).token_ids for handle in handles]
        for session in sessions:
            session.close()
    return written


def logits_after(decoder: Decoder, text: Text) -> torch.Tensor:
    kv = SequenceKV(decoder.kv_shape, KVBudget(2**30))
    kv.reserve(len(text))
    return decoder.forward(Batch([Rows(kv, list(text), 1)]), ()).logits[0].clone()


def all_texts(decoder: Decoder, step: StepRequest) -> dict[Text, float]:
    """The exact probability of every text, by plain decoding of every branch in float64."""
    found: dict[Text, float] = {}
    canonical = step.forced is ForcedMode.CANONICAL

    def go(text: Text, probability: float) -> None:
        matcher: Matcher | None = None
        if step.grammar is not None:
            matcher = step.grammar.matcher(canonical=canonical)
            matcher.accept(text)
            if canonical and not matcher.is_terminated:
                text += tuple(matcher.forced()[: step.max_new_tokens - len(text)])
                matcher = step.grammar.matcher(canonical=True)
                matcher.accept(text)
        ended = matcher is not None and text and matcher.is_terminated
        if len(text) >= step.max_new_tokens or ended:
            found[text] = found.get(text, 0.0) + probability
            return
        mask = None
        if matcher is not None:
            mask = torch.zeros(matcher.words, dtype=torch.int32)
            matcher.fill_mask(mask)
        sampler = Sampler(step.sampling, PROMPT, VOCAB)
        sampler.observe(*text)
        p = sampler.probabilities(logits_after(decoder, PROMPT + text), mask)
        for token in torch.nonzero(p > 1e-9).flatten().tolist():
            go((*text, token), probability * float(p[token]))

    with torch.inference_mode():
        go((), 1.0)
    assert math.fsum(found.values()) == pytest.approx(1.0, abs=1e-5)
    return found


@pytest.mark.parametrize("sampling", [REJECTION, PROCESSED], ids=["plain", "processed"])
@pytest.mark.parametrize("budget", [None, Threshold(4, 0.3)], ids=["all", "threshold"])
def test_texts_follow_the_targets_distribution(
    sampling: SamplingParams,
    policy: BudgetPolicy | None,
    speculative: MakeEngine,
    decoder: Decoder,
    sigmas: Sigmas,
) -> None:
    engine, drafter = speculative(budget)
    step = request(3, sampling)
    assert sigmas(texts(engine, step), all_texts(decoder, step)) < 4.0
    assert len(drafter.proposals) > TRIALS


def test_plain_decoding_is_ordinary_sampling(
    tiny_files: ModelFiles, decoder: Decoder, sigmas: Sigmas
) -> None:
    step = request(3, PROCESSED)
    with Engine(tiny_files, decoder, Precision.INT8, 1, 2**28, Limits()) as engine:
        assert sigmas(texts(engine, step), all_texts(decoder, step)) < 4.0


GRAMMAR = 'start: ("ab" | "ba" | /[abc]/ | "a" /[de]{2}/) " end of " /[fg]/'


@pytest.mark.parametrize("forced", list(ForcedMode))
def test_texts_under_a_grammar_follow_it_in_every_forced_mode(
    forced: ForcedMode,
    lark: Lark,
    speculative: MakeEngine,
    decoder: Decoder,
    sigmas: Sigmas,
) -> None:
    engine, drafter = speculative()
    sampling = replace(REJECTION, logit_bias={}, temperature=0.8)
    step = request(8, sampling, grammar=lark(GRAMMAR), forced=forced)
    assert sigmas(texts(engine, step), all_texts(decoder, step)) < 4.0
    drafted = [p for _, p in drafter.proposals if any(q is not None for q in p.distributions)]
    assert len(drafted) > 100
    flags = [flag for _, p in drafter.proposals for flag in p.forced]
    assert any(flags) == (forced is ForcedMode.CANONICAL)


def test_illegal_drafts_are_rejected_into_the_residual_and_must_not_be_cut(
    lark: Lark,
    speculative: MakeEngine,
    tiny_files: ModelFiles,
    decoder: Decoder,
    sigmas: Sigmas,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A drafter that knows no grammar: exact where its illegal drafts are in the block, biased
    where the block is cut before them."""
    tokenizer = tiny_files.tokenizer()
    letters = [tokenizer.decode([token]) for token in SPOKEN]
    step = request(
        2, grammar=lark(f"start: /[{''.join(letters[:3])}]{{5}}/"), forced=ForcedMode.OFF
    )
    expected = all_texts(decoder, step)

    def written() -> list[Text]:
        engine, drafter = speculative(masked=False)
        out = []
        for seed in range(TRIALS):
            drafter.seed = seed
            with engine.open_session() as session:
                own = replace(step, sampling=replace(step.sampling, seed=seed))
                out.append(engine.step(session, own).token_ids)
        return out

    assert sigmas(written(), expected) < 4.0

    def cut(trail: Any, drafts: Sequence[int], *rest: Any, **fields: Any) -> Block:
        legal = 0
        while legal < len(drafts) and is_allowed(trail.mask(drafts[:legal]), drafts[legal]):
            legal += 1
        fields["distributions"] = fields["distributions"][:legal]
        return constrained(trail, drafts[:legal], *rest, **fields)

    monkeypatch.setattr(running, "constrained", cut)
    assert sigmas(written(), expected) > 8.0


class Retrospective(Budget):
    """Looks at the whole block before it decides about the first draft: c_2 knows x_1."""

    def take(self, survival: Sequence[float], room: int) -> int:
        return min(room, 2) if len(survival) > 1 and survival[1] > 0.5 * survival[0] else 0


def test_a_budget_that_looks_back_is_biased_and_ours_is_not(
    speculative: MakeEngine, decoder: Decoder, sigmas: Sigmas
) -> None:
    """The paper's counterexample, in the loop."""
    step = request(3)
    expected = dict.fromkeys(SPOKEN, 0.0)
    for text, p in all_texts(decoder, step).items():
        expected[text[0]] += p
    distances = []
    for budget in (Threshold(2, 0.02), Retrospective(2)):
        engine, _ = speculative(budget)
        distances.append(sigmas([text[0] for text in texts(engine, step)], expected))
    ours, looking_back = distances
    assert ours < 4.0
    assert looking_back > 8.0


def test_more_drafts_stand_than_with_coupled_sampling(speculative: MakeEngine) -> None:
    shares = []
    for rule in AcceptanceRule:
        engine, drafter = speculative()
        if rule is AcceptanceRule.COUPLED:
            drafter._masked_block = _greedy(drafter)  # type: ignore[method-assign]
        step = request(40, replace(REJECTION, acceptance=rule))
        accepted = proposed = 0
        for seed in range(20):
            with engine.open_session() as session:
                own = replace(step, sampling=replace(step.sampling, seed=seed))
                metrics = engine.step(session, own).metrics
            accepted += metrics.accepted.get("markov", 0)
            proposed += metrics.proposed["markov"]
        shares.append(accepted / proposed)
    coupled, rejection = shares
    assert rejection > coupled


def _greedy(drafter: MarkovDrafter) -> Callable[[Anchor], Proposal]:
    def block(anchor: Anchor) -> Proposal:
        assert anchor.guide is None
        last, drafts = (anchor.token, *anchor.known)[-1], []
        for _ in range(drafter.block_size - len(anchor.known)):
            last = SPOKEN[int(drafter._logits[last, list(SPOKEN)].argmax())]
            drafts.append(last)
        return Proposal(tuple(drafts), (1.0,) * len(drafts), "markov")

    return block


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
    engine, drafter = speculative()
    drafter._masked_block = _greedy(drafter)  # type: ignore[method-assign]
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
