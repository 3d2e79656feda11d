"""What is emitted follows the target's distribution: chi-squared tests on small vocabularies, and
the known ways of getting it wrong, which the same tests catch (DSPARK.md, section 6).

Everything is keyed by fixed seeds, so these tests either always pass or always fail.
"""

import dataclasses
import itertools
import math
from collections import Counter

import pytest
import torch

from dspark_backend.request import SamplingParams
from dspark_backend.sampling import Sampler
from dspark_backend.sampling.choose import sample
from dspark_backend.sampling.noise import Noise, Stream
from dspark_backend.sampling.verify import verify_rejection


def chi_squared_sigmas(outcomes, probabilities):
    """How far outcomes are from their probabilities, in standard deviations of a normal variable
    (Wilson and Hilferty 1931). Outcomes expected less than five times are pooled."""
    counts = Counter(outcomes)
    total = sum(counts.values())
    assert all(probabilities.get(outcome, 0.0) > 0.0 for outcome in counts), "impossible outcome"
    seen, wanted = Counter(), Counter()
    for outcome, p in probabilities.items():
        cell = outcome if p * total >= 5 else "rare"
        seen[cell] += counts[outcome]
        wanted[cell] += p * total
    statistic = sum(
        (seen[cell] - wanted[cell]) ** 2 / wanted[cell] for cell in wanted if wanted[cell]
    )
    freedom = len(wanted) - 1
    spread = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def matches(outcomes, probabilities):
    return chi_squared_sigmas(outcomes, probabilities) < 4.0


def table(probabilities):
    return {token: float(p) for token, p in enumerate(probabilities)}


# --- plain decoding --------------------------------------------------------------------------


def along_positions(params, logits, trials):
    sampler = Sampler(params, [3, 5], len(logits))
    for _ in range(trials):
        yield sampler.next(logits)
        sampler.observe(3)


def along_seeds(params, logits, trials):
    for seed in range(trials):
        yield Sampler(dataclasses.replace(params, seed=seed), [3, 5], len(logits)).next(logits)


CONFIGURATIONS = {
    "plain": SamplingParams(temperature=1.0),
    "top-p": SamplingParams(temperature=0.6, top_p=0.9),
    "top-k and min-p": SamplingParams(temperature=1.4, top_k=6, min_p=0.02),
    "bias and repetition": SamplingParams(
        temperature=1.0, logit_bias={3: 1.0}, repetition_penalty=1.3
    ),
}


@pytest.mark.parametrize("params", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
@pytest.mark.parametrize("draws", [along_positions, along_seeds])
def test_tokens_follow_the_processed_distribution(params, draws):
    logits = torch.randn(12, generator=torch.Generator().manual_seed(0)) * 1.5
    expected = Sampler(params, [3, 5], 12).probabilities(logits)
    assert matches(draws(params, logits, 10_000), table(expected))


def test_tokens_of_a_long_row_follow_it_too():
    """Long enough for the race with its bounds; the unlikely half of the mass is pooled."""
    logits = -1.2 * torch.arange(1.0, 4001.0).log()
    params = SamplingParams(temperature=1.0, seed=2)
    expected = Sampler(params, [3, 5], 4000).probabilities(logits)
    assert matches(along_positions(params, logits, 10_000), table(expected))


def test_tokens_at_neighbouring_positions_are_independent():
    logits = torch.randn(5, generator=torch.Generator().manual_seed(1))
    params = SamplingParams(temperature=1.0, seed=4)
    p = table(Sampler(params, [3, 5], 5).probabilities(logits))
    pairs = {(a, b): p[a] * p[b] for a, b in itertools.product(p, p)}
    assert matches(itertools.pairwise(along_positions(params, logits, 10_000)), pairs)


# --- speculation on a Markov chain -----------------------------------------------------------

TOKENS = 4
ILLEGAL = 3


def markov(seed, *, forbid=None):
    """``[TOKENS, TOKENS] float64``: the next token's distribution after each token."""
    logits = 1.5 * torch.randn(
        TOKENS, TOKENS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    if forbid is not None:
        logits[:, forbid] = -torch.inf
    return logits.softmax(1)


def chain_probabilities(target, length):
    """Exact probability of every text of ``length`` tokens after token 0."""
    return {
        text: math.prod(float(target[a, b]) for a, b in itertools.pairwise((0, *text)))
        for text in itertools.product(range(TOKENS), repeat=length)
    }


def decode_by_rejection(target, drafter, seed, length, block, budget=lambda anchor, drafts: None):
    """``budget(anchor, drafts)`` is how many drafts to verify; None for all of them."""
    log = [0]
    while len(log) <= length:
        anchor = log[-1]
        drafts, q = [], []
        for slot in range(block):
            q.append(drafter[drafts[-1] if drafts else anchor])
            drafts.append(sample(q[-1], Noise(seed, Stream.DRAFT, len(log) - 1, slot)))
        verified = drafts[: budget(anchor, drafts)]
        acceptance = verify_rejection(
            target[[anchor, *verified]],
            verified,
            torch.stack(q)[: len(verified)],
            seed=seed,
            position=len(log),
        )
        log += [*verified[: acceptance.accepted], acceptance.next_token]
    return tuple(log[1 : length + 1])


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("forbid", [None, ILLEGAL], ids=["free", "illegal drafts"])
def test_rejection_sampling_emits_the_targets_texts(block, forbid):
    """Joint over three tokens, so that what is conditioned on a rejection is tested as well."""
    target, drafter = markov(1, forbid=forbid), markov(2)
    texts = [decode_by_rejection(target, drafter, seed, 3, block) for seed in range(4000)]
    possible = {text: p for text, p in chain_probabilities(target, 3).items() if p > 0.0}
    assert matches(texts, possible)


def test_rejection_sampling_is_exact_when_the_budget_sees_no_draft_it_decides_about():
    """The first draft is always verified; whether the second is may depend on the first."""
    target, drafter = markov(1), markov(2)
    texts = [
        decode_by_rejection(target, drafter, seed, 3, 2, lambda _, drafts: 1 + (drafts[0] > 1))
        for seed in range(4000)
    ]
    assert matches(texts, chain_probabilities(target, 3))


# --- the known ways of getting it wrong ------------------------------------------------------

TARGET = torch.tensor([[0.7, 0.3]], dtype=torch.float64)
DRAFTER = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
TRIALS = range(4000)


def first_token(p, q, seed, *, verified=lambda draft: True):
    """One draft token; where it is not to be ``verified``, the target samples on its own."""
    draft = sample(q[0], Noise(seed, Stream.DRAFT, 0))
    drafts = [draft] if verified(draft) else []
    acceptance = verify_rejection(
        p.expand(len(drafts) + 1, -1), drafts, q[: len(drafts)], seed=seed, position=1
    )
    return drafts[0] if acceptance.accepted else acceptance.next_token


def test_a_budget_that_peeks_at_the_draft_biases_rejection_sampling():
    """The paper's counterexample: 0.70 / 0.30 turns into 0.85 / 0.15."""
    honest = [first_token(TARGET, DRAFTER, seed) for seed in TRIALS]
    peeking = [first_token(TARGET, DRAFTER, seed, verified=lambda d: d == 0) for seed in TRIALS]
    assert matches(honest, {0: 0.70, 1: 0.30})
    assert matches(peeking, {0: 0.85, 1: 0.15})


def test_coupled_sampling_is_exact_under_the_same_peeking_budget():
    params = SamplingParams(temperature=1.0)
    row = TARGET[0].log().float()
    tokens = []
    for seed in TRIALS:
        sampler = Sampler(dataclasses.replace(params, seed=seed), [0], 2)
        draft = sample(DRAFTER[0], Noise(seed, Stream.DRAFT, 0))
        drafts = [draft] if draft == 0 else []
        acceptance = sampler.verify(row.expand(len(drafts) + 1, -1), drafts)
        tokens.append(draft if acceptance.accepted else acceptance.next_token)
        assert tokens[-1] == sampler.next(row)
    assert matches(tokens, {0: 0.70, 1: 0.30})


def test_an_illegal_draft_is_rejected_into_the_residual():
    """p' = (a .5, c .5), q = (a .5, illegal .5): cutting the block there gives a = .75."""
    p = torch.tensor([[0.5, 0.0, 0.5]], dtype=torch.float64)
    q = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64)
    ours = [first_token(p, q, seed) for seed in TRIALS]
    cut = [first_token(p, q, seed, verified=lambda d: d != 1) for seed in TRIALS]
    assert matches(ours, {0: 0.5, 2: 0.5})
    assert matches(cut, {0: 0.75, 2: 0.25})


def test_drafts_and_the_ratio_test_must_not_share_noise(monkeypatch):
    """The noise that made a token win is small, so a ratio test that re-uses it says yes too often
    and the output leans towards the drafter."""
    p = torch.tensor([[0.6, 0.2, 0.1, 0.1]], dtype=torch.float64)
    q = torch.full((1, 4), 0.25, dtype=torch.float64)
    expected = table(p[0])
    assert matches([first_token(p, q, seed) for seed in TRIALS], expected)

    def shared(seed, position):
        noise, ids = Noise(seed, Stream.DRAFT, 0), torch.arange(4).numpy().astype("uint32")
        return float(noise.uniform(ids)[sample(q[0], noise)])

    monkeypatch.setattr("dspark_backend.sampling.verify.acceptance_uniform", shared)
    assert chi_squared_sigmas([first_token(p, q, seed) for seed in TRIALS], expected) > 20.0
