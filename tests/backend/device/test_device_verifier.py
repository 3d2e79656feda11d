"""The device's verdicts are those of the CPU's sampler, whatever the parameters of the steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_backend.errors import BackendError, GrammarError
from dspark_backend.request import AcceptanceRule, SamplingParams
from dspark_backend.sampling.device import DeviceVerifier
from dspark_backend.sampling.sampler import Sampler
from dspark_backend.sampling.verifier import HostVerifier, Question
from dspark_backend.sampling.verify import Acceptance
from dspark_backend.speculation.distribution import Distribution

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB = 75
WORDS = (VOCAB + 31) // 32
REJECTION = AcceptanceRule.REJECTION
PARAMS = {
    "greedy": SamplingParams(),
    "greedy penalised": SamplingParams(
        repetition_penalty=1.4, logit_bias={3: 2.5, 70: -np.inf}, frequency_penalty=0.3
    ),
    "coupled": SamplingParams(temperature=0.9, seed=5),
    "coupled, negative seed": SamplingParams(temperature=1.3, seed=-(2**40)),
    "coupled, huge seed": SamplingParams(temperature=1.3, seed=2**64 + 2**63 + 5),
    "top-k": SamplingParams(temperature=0.8, top_k=4, seed=1),
    "top-p": SamplingParams(temperature=1.1, top_p=0.6, seed=2),
    "min-p": SamplingParams(temperature=1.0, min_p=0.2, seed=3),
    "all at once": SamplingParams(
        temperature=1.2,
        top_k=30,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.2,
        presence_penalty=0.5,
        frequency_penalty=-0.2,
        logit_bias={1: -1.0, 50: 3.0},
        seed=4,
    ),
    "rejection": SamplingParams(temperature=0.9, seed=6, acceptance=REJECTION),
    "rejection, cut": SamplingParams(temperature=0.9, top_k=9, seed=7, acceptance=REJECTION),
}


def question(params: SamplingParams, drafts: int, seed: int, masked: bool) -> Question:
    """A block of random drafts, sampled ones where the parameters ask for rejection."""
    rng = np.random.default_rng(seed)
    sampler = Sampler(params, rng.integers(0, VOCAB, 9).tolist(), VOCAB)
    sampler.observe(*rng.integers(0, VOCAB, 5).tolist())
    tokens = rng.integers(0, VOCAB, drafts).tolist()
    masks: tuple[torch.Tensor | None, ...] | None = None
    if masked:
        words = rng.integers(-(2**31), 2**31, (drafts + 1, WORDS)).astype(np.int32)
        words[:, 0] |= 1
        masks = tuple(torch.from_numpy(w) if rng.random() < 0.8 else None for w in words)
    drawn: list[Distribution | None] = []
    if sampler.rejects:
        for place, token in enumerate(tokens):
            if rng.random() < 0.3:
                drawn.append(None)
                continue
            ids = np.unique(np.append(rng.integers(0, VOCAB, 20), token)).astype(np.uint32)
            p = rng.random(len(ids)) + 1e-3
            drawn.append(Distribution(ids, p / p.sum()))
            tokens[place] = token
    return Question(sampler, tuple(tokens), masks, tuple(drawn))


def likely(questions: Sequence[Question], seed: int) -> tuple[torch.Tensor, list[Question]]:
    """Logits, and the questions with drafts that mostly stand."""
    g = torch.Generator().manual_seed(seed)
    rows = sum(q.rows for q in questions)
    logits = 2 * torch.randn(rows, VOCAB, generator=g)
    row, told = 0, []
    for q in questions:
        drafts = list(q.drafts)
        if not q.sampler.rejects:
            for k in range(len(drafts)):
                mask = None if q.masks is None else q.masks[k]
                q.sampler.observe(*drafts[:k])
                if torch.rand(1, generator=g) < 0.8:
                    drafts[k] = q.sampler.next(logits[row + k], mask)
                q.sampler._forget(k)
        row += q.rows
        told.append(replace(q, drafts=tuple(drafts)))
    return logits, told


def judged(
    logits: torch.Tensor, questions: Sequence[Question], verifier: Any = None
) -> list[Acceptance]:
    verifier = verifier or DeviceVerifier()
    return [answer() for answer in verifier.ask(logits.to(DEVICE), questions)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
def test_verdicts_are_the_samplers(params: SamplingParams, masked: bool) -> None:
    asked = [question(params, n, seed, masked) for seed, n in enumerate((0, 3, 5, 1, 4, 4))]
    for seed in range(4):
        logits, questions = likely(asked, seed)
        assert judged(logits, questions) == judged(logits.cpu(), questions, HostVerifier())


mixtures = st.lists(
    st.tuples(st.sampled_from(sorted(PARAMS)), st.integers(0, 6), st.booleans()), max_size=5
)


@settings(max_examples=25, deadline=None)
@given(mixtures, st.integers(0, 2**20))
def test_mixtures_of_steps_are_judged_as_each_alone(
    mixture: list[tuple[str, int, bool]], seed: int
) -> None:
    asked = [question(PARAMS[p], n, seed + i, m) for i, (p, n, m) in enumerate(mixture)]
    before = [(q.sampler.position, q.sampler.counted(())) for q in asked]
    if not asked:
        assert DeviceVerifier().ask(torch.empty(0, VOCAB), []) == []
        return
    logits, questions = likely(asked, seed)
    kept = logits.clone()
    together = judged(logits, questions)
    assert together == judged(logits, questions, HostVerifier())
    row, alone = 0, []
    for q in questions:
        alone += judged(logits[row : row + q.rows], [q])
        row += q.rows
    assert together == alone
    assert torch.equal(logits, kept)
    after = [(q.sampler.position, q.sampler.counted(())) for q in asked]
    assert str(before) == str(after)


def test_bfloat16_logits_are_judged_as_the_numbers_that_they_are() -> None:
    asked = [question(params, 3, i, True) for i, params in enumerate(PARAMS.values())]
    logits, questions = likely(asked, 8)
    rounded = logits.bfloat16()
    assert judged(rounded, questions) == judged(rounded.float().cpu(), questions, HostVerifier())


def test_a_step_that_cannot_go_on_says_why_and_its_neighbours_do_not_notice() -> None:
    asked = [question(PARAMS[name], 2, 3, False) for name in ("greedy", "top-p", "coupled")]
    logits, questions = likely(asked, 1)
    expected = judged(logits, questions)
    dead = replace(questions[0], masks=(torch.zeros(WORDS, dtype=torch.int32),))
    answers = DeviceVerifier().ask(logits.to(DEVICE), [dead, *questions[1:]])
    with pytest.raises(GrammarError, match="allows no token"):
        answers[0]()
    assert [answer() for answer in answers[1:]] == expected[1:]
    for poison in (torch.nan, torch.inf):
        bad = logits.clone()
        bad[3, 11] = poison
        answers = DeviceVerifier().ask(bad.to(DEVICE), questions)
        with pytest.raises(BackendError, match="the forward pass went wrong"):
            answers[1]()
        assert (answers[0](), answers[2]()) == (expected[0], expected[2])
    nothing = SamplingParams(logit_bias=dict.fromkeys(range(VOCAB), -np.inf))
    (answer,) = DeviceVerifier().ask(logits[:1].to(DEVICE), [question(nothing, 0, 0, False)])
    with pytest.raises(BackendError, match="logit biases"):
        answer()


def test_masks_may_end_with_the_one_that_rules_a_draft_out() -> None:
    q = question(PARAMS["greedy"], 3, 0, False)
    logits, (q,) = likely([q], 5)
    mask = torch.full((WORDS,), -1, dtype=torch.int32)
    mask[q.drafts[1] >> 5] &= ~(1 << (q.drafts[1] & 31))
    cut = replace(q, masks=(None, mask))
    (verdict,) = judged(logits, [cut])
    assert verdict == judged(logits, [cut], HostVerifier())[0]
    assert verdict.accepted <= 1
