"""Rejection sampling in the engine's loop emits the target's distribution: chi-squared tests over
whole texts, and the known ways of getting it wrong, which the same tests catch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from dspark_backend import running
from dspark_backend.catalog.files import ModelFiles
from dspark_backend.engine import Engine
from dspark_backend.grammar.bitmask import is_allowed
from dspark_backend.grammar.compile import Grammar
from dspark_backend.grammar.matcher import Matcher
from dspark_backend.kv.budget import KVBudget
from dspark_backend.kv.contiguous import SequenceKV
from dspark_backend.parts import Parts
from dspark_backend.request import (
    AcceptanceRule,
    ForcedMode,
    SamplingParams,
    StepRequest,
)
from dspark_backend.sampling import Sampler
from dspark_backend.sampling.verifier import HostVerifier
from dspark_backend.scheduler import Limits
from dspark_backend.speculation.block import Block, Offer, constrained
from dspark_backend.speculation.candidate import BudgetPolicy, Candidate, CycleCost
from dspark_backend.speculation.policies import Threshold
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


MakeEngine = Callable[..., tuple[Engine, Any]]


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
@pytest.mark.parametrize("policy", [None, Threshold(4, 0.3)], ids=["all", "threshold"])
def test_texts_follow_the_targets_distribution(
    sampling: SamplingParams,
    policy: BudgetPolicy | None,
    speculative: MakeEngine,
    decoder: Decoder,
    sigmas: Sigmas,
) -> None:
    engine, drafter = speculative(policy)
    step = request(3, sampling)
    assert sigmas(texts(engine, step), all_texts(decoder, step)) < 4.0
    assert len(drafter.proposals) > TRIALS


def test_plain_decoding_is_ordinary_sampling(
    tiny_files: ModelFiles, decoder: Decoder, sigmas: Sigmas
) -> None:
    step = request(3, PROCESSED)
    parts = Parts(decoder, HostVerifier(), None, Precision.INT8)
    with Engine(tiny_files, parts, 1, 2**28, Limits()) as engine:
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

    def cut(trail: Any, offer: Offer | None, **fields: Any) -> Block:
        drafts = () if offer is None else offer.proposal.tokens
        legal = 0
        while legal < len(drafts) and is_allowed(trail.mask(drafts[:legal]), drafts[legal]):
            legal += 1
        first = None if offer is None else Offer.as_said(offer.proposal.first(legal))
        return constrained(trail, first, **fields)

    monkeypatch.setattr(running, "constrained", cut)
    assert sigmas(written(), expected) > 8.0


class Retrospective:
    """Looks at the whole block before it decides about the first draft: c_2 knows x_1."""

    parks = False

    def lengths(self, candidates: Sequence[Candidate], cost: CycleCost) -> list[int]:
        return [self._length(each.survival, each.most) for each in candidates]

    def _length(self, survival: Sequence[float], most: int) -> int:
        return min(most, 2) if len(survival) > 1 and survival[1] > 0.5 * survival[0] else 0


def test_a_budget_that_looks_back_is_biased_and_ours_is_not(
    speculative: MakeEngine, decoder: Decoder, sigmas: Sigmas
) -> None:
    """The paper's counterexample, in the loop."""
    step = request(3)
    expected = dict.fromkeys(SPOKEN, 0.0)
    for text, p in all_texts(decoder, step).items():
        expected[text[0]] += p
    distances = []
    for policy in (Threshold(2, 0.02), Retrospective()):
        engine, _ = speculative(policy)
        distances.append(sigmas([text[0] for text in texts(engine, step)], expected))
    ours, looking_back = distances
    assert ours < 4.0
    assert looking_back > 8.0


def test_more_drafts_stand_than_with_coupled_sampling(speculative: MakeEngine) -> None:
    shares = []
    for rule in AcceptanceRule:
        engine, _ = speculative()
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
