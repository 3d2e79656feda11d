"""The readable verification rules, and the engine's sampler against them."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_backend.errors import BackendError
from dspark_backend.request import AcceptanceRule, SamplingParams
from dspark_backend.sampling import Acceptance, Sampler
from dspark_backend.sampling.noise import coupled_noise
from dspark_backend.sampling.verify import verify_coupled, verify_greedy, verify_rejection

VOCAB = 6
blocks = st.lists(st.integers(0, VOCAB - 1), max_size=5)


def rows(seed, count):
    return torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None)
@given(blocks, st.integers(0, 1000))
def test_the_sampler_verifies_as_the_greedy_rule(drafts, seed):
    logits = rows(seed, len(drafts) + 1)
    assert Sampler(SamplingParams(), [0], VOCAB).verify(logits, drafts) == verify_greedy(
        logits, drafts
    )


@settings(deadline=None)
@given(blocks, st.integers(0, 1000), st.integers(0, 50))
def test_the_sampler_verifies_as_the_coupled_rule(drafts, seed, position):
    logits = rows(seed, len(drafts) + 1)
    sampler = Sampler(SamplingParams(temperature=0.5, seed=seed), [0] * position, VOCAB)
    expected = verify_coupled(logits / 0.5, drafts, seed=seed, position=position)
    assert sampler.verify(logits, drafts) == expected


@settings(deadline=None)
@given(st.lists(st.booleans(), max_size=5), st.integers(0, 1000), st.integers(0, 50))
def test_the_sampler_verifies_as_the_rejection_rule(sampled, seed, position):
    """Drafts that were drawn and drafts that are certain, under penalties that see them."""
    params = SamplingParams(
        temperature=0.7,
        top_k=4,
        presence_penalty=0.5,
        seed=seed,
        acceptance=AcceptanceRule.REJECTION,
    )
    sampler, twin = (Sampler(params, [0] * position, VOCAB) for _ in range(2))
    logits, drafter = rows(seed, len(sampled) + 1), rows(seed + 1, len(sampled))
    drafts, drawn, p, q = [], [], [], []
    for slot, is_sampled in enumerate(sampled):
        token, distribution = sampler.draft(
            drafter[slot].numpy(), None, drafts, anchor=position, slot=slot
        )
        drawn.append(distribution if is_sampled else None)
        one_hot = torch.eye(VOCAB, dtype=torch.float64)[token]
        q.append(torch.from_numpy(distribution.dense(VOCAB)) if is_sampled else one_hot)
        p.append(twin.probabilities(logits[slot]))
        twin.observe(token)
        drafts.append(token)
    p.append(twin.probabilities(logits[-1]))
    stacked = torch.stack(q) if q else torch.empty(0, VOCAB, dtype=torch.float64)
    expected = verify_rejection(torch.stack(p), drafts, stacked, seed=seed, position=position)
    assert sampler.verify(logits, drafts, None, drawn) == expected
    assert sampler.position == position


def test_a_draft_is_drawn_from_the_distribution_that_is_kept():
    """q' has the processors in it, penalties of the drafts before it included."""
    params = SamplingParams(
        temperature=0.8, top_k=4, frequency_penalty=0.7, acceptance=AcceptanceRule.REJECTION
    )
    logits = rows(3, 1)[0]
    tokens = []
    for seed in range(4000):
        sampler = Sampler(replace(params, seed=seed), [1, 2], VOCAB)
        token, kept = sampler.draft(logits.numpy(), None, [2, 2], anchor=1, slot=2)
        tokens.append(token)
    sampler.observe(2, 2)
    exact = sampler.probabilities(logits)
    torch.testing.assert_close(torch.from_numpy(kept.dense(VOCAB)), exact, rtol=0, atol=0)
    assert [kept.of(token) for token in range(VOCAB)] == exact.tolist()
    drawn = torch.bincount(torch.tensor(tokens), minlength=VOCAB) / len(tokens)
    torch.testing.assert_close(drawn.double(), exact, rtol=0, atol=0.03)


def test_a_drafter_that_can_say_nothing_draws_nothing():
    sampler = Sampler(SamplingParams(temperature=1.0, logit_bias={2: -torch.inf}), [0], VOCAB)
    row = torch.full((VOCAB,), -torch.inf).numpy()
    row[2] = 1.0
    assert sampler.draft(row, None, [], anchor=0, slot=0) is None
    row[3] = torch.nan
    with pytest.raises(BackendError, match="token 3 is nan"):
        sampler.draft(row, None, [], anchor=0, slot=0)


def test_greedy_accepts_the_longest_prefix_and_corrects_or_adds():
    logits = torch.eye(VOCAB)[[2, 4, 1]]
    assert verify_greedy(logits, [2, 4]) == Acceptance(2, 1)
    assert verify_greedy(logits, [2, 5]) == Acceptance(1, 4)
    assert verify_greedy(logits, [3, 4]) == Acceptance(0, 2)
    assert verify_greedy(logits[:1], []) == Acceptance(0, 2)


def test_greedy_ties_go_to_the_lowest_id():
    assert verify_greedy(torch.zeros(1, VOCAB), []) == Acceptance(0, 0)


def test_coupled_accepts_exactly_what_plain_decoding_writes():
    logits = rows(0, 4)
    written = [
        int((logits[k].double() + coupled_noise(1, 9 + k, VOCAB)).argmax()) for k in range(4)
    ]
    assert verify_coupled(logits, written[:3], seed=1, position=9) == Acceptance(3, written[3])
    wrong = [written[0], (written[1] + 1) % VOCAB, written[2]]
    assert verify_coupled(logits, wrong, seed=1, position=9) == Acceptance(1, written[1])


@pytest.mark.parametrize("seed", range(20))
def test_rejection_accepts_a_perfect_drafter(seed):
    p = rows(seed, 4).double().softmax(1)
    assert verify_rejection(p, [1, 2, 3], p[:3], seed=seed, position=0).accepted == 3


@pytest.mark.parametrize("seed", range(20))
def test_rejection_never_emits_an_illegal_token(seed):
    p = rows(seed, 2).double().softmax(1)
    p[:, 5] = 0.0
    q = rows(seed + 1, 1).double().softmax(1)
    acceptance = verify_rejection(p, [5], q, seed=seed, position=0)
    assert acceptance.accepted == 0
    assert acceptance.next_token != 5


@pytest.mark.parametrize("seed", range(20))
def test_a_deterministic_draft_that_is_rejected_is_not_emitted_after_all(seed):
    p = torch.full((2, VOCAB), 1 / VOCAB, dtype=torch.float64)
    q = torch.eye(VOCAB, dtype=torch.float64)[[2]]
    acceptance = verify_rejection(p, [2], q, seed=seed, position=0)
    assert acceptance.accepted == 1 or acceptance.next_token != 2


def test_rejection_survives_a_residual_that_rounds_to_nothing():
    """p is a hair below q at the draft and equal elsewhere: no mass is left to correct with."""
    p = torch.tensor([[0.0, 0.5, 0.5]], dtype=torch.float64)
    q = torch.tensor([[1e-300, 0.5, 0.5]], dtype=torch.float64)
    for seed in range(20):
        assert verify_rejection(p.expand(2, -1), [0], q, seed=seed, position=0).next_token in (1, 2)


def test_without_drafts_rejection_samples_the_target():
    p = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)
    none = torch.empty(0, 3, dtype=torch.float64)
    assert verify_rejection(p, [], none, seed=0, position=0) == Acceptance(0, 2)
