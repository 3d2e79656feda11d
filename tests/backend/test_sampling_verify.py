"""The readable verification rules, and the engine's sampler against them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_backend.request import SamplingParams
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
