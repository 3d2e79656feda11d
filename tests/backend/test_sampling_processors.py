"""The whole chain of processors against transformers', then what transformers lacks."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dspark_backend.errors import BackendError, GrammarError
from dspark_backend.request import SamplingParams
from dspark_backend.sampling import Sampler

VOCAB = 70


def words(allowed, vocab=VOCAB):
    bits = np.zeros((vocab + 31) // 32 * 32, dtype=np.uint8)
    bits[list(allowed)] = 1
    return torch.from_numpy(np.packbits(bits, bitorder="little").view(np.int32))


def oracle(params, allowed):
    """The same parameters as transformers' ``generate`` would chain them."""
    chain = LogitsProcessorList()
    if params.logit_bias:
        bias = {(token,): value for token, value in params.logit_bias.items()}
        chain.append(SequenceBiasLogitsProcessor(bias))
    if params.repetition_penalty != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if allowed is not None:
        chain.append(PrefixConstrainedLogitsProcessor(lambda *_: sorted(allowed), 1))
    chain.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        chain.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        chain.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0.0:
        chain.append(MinPLogitsWarper(params.min_p))
    return chain


settings_of = st.builds(
    SamplingParams,
    temperature=st.floats(0.3, 2.0),
    top_k=st.just(0) | st.integers(1, VOCAB + 5),
    top_p=st.just(1.0) | st.floats(0.01, 0.99),
    min_p=st.just(0.0) | st.floats(0.001, 0.9),
    repetition_penalty=st.just(1.0) | st.floats(0.6, 1.8),
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-8.0, 8.0), max_size=4),
)
token_lists = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20)


# Derandomised: a top-p boundary within a rounding error of the cut may fall on either side.
@settings(deadline=None, max_examples=300, derandomize=True)
@given(
    settings_of,
    token_lists,
    st.none() | st.sets(st.integers(0, VOCAB - 1), min_size=1),
    st.integers(0, 2**32 - 1),
)
def test_the_chain_agrees_with_transformers(params, log, allowed, seed):
    logits = torch.from_numpy(np.random.default_rng(seed).normal(0, 3, VOCAB).astype(np.float32))
    expected = oracle(params, allowed)(torch.tensor([log]), logits[None])[0].double().softmax(0)

    cut = len(log) // 2  # one half is the prompt, the other was generated since
    sampler = Sampler(params, log[:cut], VOCAB)
    sampler.observe(*log[cut:])
    ours = sampler.probabilities(logits, None if allowed is None else words(allowed))

    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-9)


@given(token_lists, token_lists, st.floats(-2, 2), st.floats(-2, 2))
def test_presence_and_frequency_are_subtracted_over_the_output_alone(
    prompt, output, presence, frequency
):
    logits = torch.from_numpy(np.random.default_rng(0).normal(0, 2, VOCAB).astype(np.float32))
    params = SamplingParams(temperature=1.0, presence_penalty=presence, frequency_penalty=frequency)
    sampler = Sampler(params, prompt, VOCAB)
    sampler.observe(*output)
    expected = logits.double().clone()
    for token, count in Counter(output).items():
        expected[token] -= presence + frequency * count
    torch.testing.assert_close(
        sampler.probabilities(logits), expected.softmax(0), rtol=1e-4, atol=1e-9
    )


def test_subtracted_penalties_come_after_the_repetition_penalty():
    logits = torch.tensor([4.0, -4.0, 0.5])
    params = SamplingParams(
        temperature=1.0, repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25
    )
    sampler = Sampler(params, [1], 3)
    sampler.observe(0, 0)
    expected = torch.tensor([4.0 / 2 - 0.5 - 2 * 0.25, -4.0 * 2, 0.5]).double().softmax(0)
    torch.testing.assert_close(sampler.probabilities(logits), expected, rtol=1e-6, atol=0)


def test_tokens_past_the_logits_are_not_penalised():
    params = SamplingParams(repetition_penalty=1.5)
    sampler = Sampler(params, [2, 5_000], 4)
    assert sampler.next(torch.tensor([0.0, 1.0, 1.2, 0.5])) == 1


def test_a_bias_of_minus_infinity_forbids_and_a_large_one_forces():
    logits = torch.tensor([3.0, 2.0, 1.0])
    forbidding = Sampler(SamplingParams(logit_bias={0: -np.inf}), [], 3)
    forcing = Sampler(SamplingParams(logit_bias={2: 100.0}), [], 3)
    assert (forbidding.next(logits), forcing.next(logits)) == (1, 2)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_mask_outranks_every_bias(temperature):
    params = SamplingParams(temperature=temperature, logit_bias={9: 100.0})
    assert Sampler(params, [], VOCAB).next(torch.zeros(VOCAB), words({3})) == 3


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_mask_that_allows_nothing_is_an_error(temperature):
    sampler = Sampler(SamplingParams(temperature=temperature), [], VOCAB)
    with pytest.raises(GrammarError, match="allows no token"):
        sampler.next(torch.zeros(VOCAB), words(()))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_biases_that_rule_out_all_that_is_legal_are_an_error(temperature, top_p):
    params = SamplingParams(
        temperature=temperature, top_p=top_p, logit_bias={3: -np.inf, 4: -np.inf}
    )
    with pytest.raises(BackendError, match="rule out"):
        Sampler(params, [], VOCAB).next(torch.zeros(VOCAB), words({3, 4}))


@pytest.mark.parametrize("top_k", [0, 2])
def test_a_nan_is_an_error_in_every_configuration(top_k):
    logits = torch.zeros(VOCAB)
    logits[5] = torch.nan
    sampler = Sampler(SamplingParams(temperature=0.8, top_k=top_k, top_p=0.9), [], VOCAB)
    with pytest.raises(BackendError, match="token 5 is nan"):
        sampler.next(logits)
