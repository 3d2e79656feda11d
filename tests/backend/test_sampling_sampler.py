"""The engine's surface: choices that depend on the key and the log alone, and verification that
agrees with plain decoding token for token."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_backend.errors import GrammarError
from dspark_backend.request import SamplingParams
from dspark_backend.sampling import Acceptance, Sampler

VOCAB = 40
GREEDY = SamplingParams()
COUPLED = SamplingParams(temperature=0.9, seed=3)
EVERYTHING = SamplingParams(
    temperature=0.9,
    top_k=25,
    top_p=0.95,
    min_p=0.01,
    repetition_penalty=1.2,
    presence_penalty=0.3,
    frequency_penalty=0.2,
    logit_bias={4: 1.0},
    seed=3,
)
GREEDY_PENALISED = SamplingParams(repetition_penalty=1.3, frequency_penalty=0.5)
CONFIGURATIONS = [
    pytest.param(params, id=name)
    for name, params in {
        "greedy": GREEDY,
        "coupled": COUPLED,
        "everything": EVERYTHING,
        "greedy penalised": GREEDY_PENALISED,
    }.items()
]


def words(allowed, vocab=VOCAB):
    bits = np.zeros((vocab + 31) // 32 * 32, dtype=np.uint8)
    bits[list(allowed)] = 1
    return torch.from_numpy(np.packbits(bits, bitorder="little").view(np.int32))


class ToyModel:
    """Logits and legal tokens as functions of the log, as a language model and a grammar are."""

    def logits(self, log):
        seed = hash(tuple(log[-3:])) % 2**32
        return torch.from_numpy(
            np.random.default_rng(seed).normal(0, 1.5, VOCAB).astype(np.float32)
        )

    def legal(self, log):
        return {v for v in range(VOCAB) if (v + log[-1]) % 3 != 0}

    def mask(self, log):
        return words(self.legal(log))

    def block(self, log, drafts, masked):
        """What the engine hands to ``verify``: a row after each prefix of the drafts, and masks up
        to the first illegal draft, past which a matcher cannot go."""
        prefixes = [[*log, *drafts[:k]] for k in range(len(drafts) + 1)]
        rows = torch.stack([self.logits(prefix) for prefix in prefixes])
        if not masked:
            return rows, None
        masks = []
        for k, prefix in enumerate(prefixes):
            masks.append(self.mask(prefix))
            if k < len(drafts) and drafts[k] not in self.legal(prefix):
                break
        return rows, masks


def decode_plainly(params, log, count, masked):
    model, log = ToyModel(), list(log)
    sampler = Sampler(params, log, VOCAB)
    for _ in range(count):
        token = sampler.next(model.logits(log), model.mask(log) if masked else None)
        log.append(token)
        sampler.observe(token)
    return log


def decode_speculatively(params, log, count, masked, drafter):
    model, log, goal = ToyModel(), list(log), len(log) + count
    sampler, accepted_drafts = Sampler(params, log, VOCAB), 0
    while len(log) < goal:
        drafts = drafter(log)
        acceptance = sampler.verify(*_rows_drafts_masks(model, log, drafts, masked))
        tokens = [*drafts[: acceptance.accepted], acceptance.next_token]
        accepted_drafts += acceptance.accepted
        log.extend(tokens)
        sampler.observe(*tokens)
    return log[:goal], accepted_drafts


def _rows_drafts_masks(model, log, drafts, masked):
    rows, masks = model.block(log, drafts, masked)
    return rows, drafts, masks


@pytest.mark.parametrize("params", CONFIGURATIONS)
@pytest.mark.parametrize("masked", [False, True], ids=["free", "grammar"])
@pytest.mark.parametrize("hit_rate", [0.0, 0.7, 1.0])
def test_speculation_never_changes_the_output(params, masked, hit_rate):
    """The drafter looks at the very text that plain decoding writes and may be wrong at will; the
    block lengths are arbitrary: no scheduler can do worse."""
    prompt = [5, 9, 5]
    plain = decode_plainly(params, prompt, 60, masked)
    rng = np.random.default_rng(0)

    def drafter(log):
        truth = plain[len(log) : len(log) + int(rng.integers(0, 7))]
        return [t if rng.random() < hit_rate else int(rng.integers(VOCAB)) for t in truth]

    speculative, accepted = decode_speculatively(params, prompt, 60, masked, drafter)
    assert speculative == plain
    assert accepted >= 20 * hit_rate


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([GREEDY, COUPLED, EVERYTHING, GREEDY_PENALISED]),
    st.lists(st.integers(0, VOCAB - 1), max_size=6),
    st.booleans(),
)
def test_verify_leaves_no_trace(params, drafts, masked):
    model, log = ToyModel(), [1, 2, 3]
    sampler, untouched = Sampler(params, log, VOCAB), Sampler(params, log, VOCAB)
    first = sampler.verify(*_rows_drafts_masks(model, log, drafts, masked))
    assert sampler.verify(*_rows_drafts_masks(model, log, drafts, masked)) == first
    assert sampler.position == untouched.position
    row = model.logits(log)
    assert torch.equal(sampler.probabilities(row), untouched.probabilities(row))


def test_an_error_inside_a_block_leaves_no_trace():
    sampler = Sampler(GREEDY_PENALISED, [0], VOCAB)
    rows = torch.zeros(3, VOCAB)
    rows[0, 7] = 5.0
    with pytest.raises(GrammarError):
        sampler.verify(rows, [7, 7], [None, words(()), None])
    assert sampler.position == 1
    assert sampler.next(rows[0]) == 7


def test_penalties_inside_a_block_see_the_drafts_before_them():
    sampler = Sampler(SamplingParams(presence_penalty=2.0), [0], VOCAB)
    rows = torch.zeros(3, VOCAB)
    rows[:, 7], rows[:, 8] = 2.5, 2.0
    assert sampler.verify(rows, [7, 8]) == Acceptance(2, 7)


def test_a_draft_after_the_first_mismatch_is_not_accepted():
    rows = torch.zeros(4, VOCAB)
    rows[0, 1] = rows[1, 2] = rows[2, 3] = rows[3, 4] = 1.0
    assert Sampler(GREEDY, [0], VOCAB).verify(rows, [1, 9, 3]) == Acceptance(1, 2)


def test_masks_may_end_with_the_one_that_rules_a_draft_out():
    rows = torch.zeros(4, VOCAB)
    rows[:, 7] = 1.0
    acceptance = Sampler(GREEDY, [0], VOCAB).verify(rows, [7, 7, 7], [words({7}), words({8})])
    assert acceptance == Acceptance(1, 8)


def test_a_block_and_its_rows_must_fit():
    with pytest.raises(ValueError, match="3 rows"):
        Sampler(GREEDY, [], VOCAB).verify(torch.zeros(2, VOCAB), [1, 2])
    with pytest.raises(ValueError, match=r"\[40\]"):
        Sampler(GREEDY, [], VOCAB).next(torch.zeros(VOCAB + 1))


@pytest.mark.parametrize("params", CONFIGURATIONS)
def test_the_callers_logits_and_mask_are_not_written_to(params):
    logits, mask = torch.randn(VOCAB), words(range(0, VOCAB, 2))
    before = logits.clone(), mask.clone()
    sampler = Sampler(params, [1, 2, 4], VOCAB)
    sampler.next(logits, mask)
    sampler.probabilities(logits, mask)
    sampler.verify(torch.stack([logits, logits]), [3], [mask, mask])
    assert torch.equal(logits, before[0])
    assert torch.equal(mask, before[1])


def test_the_noise_belongs_to_the_position_in_the_log():
    """Prompt or output, one call of ``observe`` or many: only the index of the token counts."""
    logits = torch.zeros(5000)
    prompted = Sampler(COUPLED, range(10), 5000)
    grown = Sampler(COUPLED, range(4), 5000)
    grown.observe(4)
    grown.observe(5, 6, 7, 8, 9)
    assert grown.position == prompted.position == 10
    assert grown.next(logits) == prompted.next(logits)
    grown.observe(1)
    assert grown.next(logits) != prompted.next(logits)


def test_sessions_that_take_turns_write_what_they_write_alone():
    prompts = [[1, 2, 3], [7], [9, 9, 1, 4]]
    alone = [decode_plainly(EVERYTHING, prompt, 20, True) for prompt in prompts]
    model, logs = ToyModel(), [list(prompt) for prompt in prompts]
    samplers = [Sampler(EVERYTHING, log, VOCAB) for log in logs]
    for _ in range(20):
        rows = torch.stack([model.logits(log) for log in logs])
        for sampler, log, row in zip(samplers, logs, rows, strict=True):
            log.append(sampler.next(row, model.mask(log)))
            sampler.observe(log[-1])
    assert logs == alone


@pytest.mark.parametrize("params", CONFIGURATIONS)
def test_the_choice_does_not_depend_on_torchs_threads(params):
    logits = torch.randn(20, 60_000, generator=torch.Generator().manual_seed(0)) * 3
    before = torch.get_num_threads()
    choices = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            sampler = Sampler(params, range(100), 60_000)
            choices.append([sampler.next(row) for row in logits])
    finally:
        torch.set_num_threads(before)
    assert choices[0] == choices[1] == choices[2]


@pytest.mark.parametrize("params", CONFIGURATIONS)
@pytest.mark.parametrize("legal_share", [0.001, 0.05, 0.5, 0.999], ids=lambda s: f"legal {s:.1%}")
def test_narrow_and_wide_masks_choose_the_best_legal_token(params, legal_share):
    vocab, rng = 30_000, np.random.default_rng(int(legal_share * 1000))
    for position in range(5):
        logits = torch.from_numpy(rng.normal(0, 2, vocab).astype(np.float32))
        allowed = np.flatnonzero(rng.random(vocab) < legal_share)
        forbidden = torch.full((vocab,), -torch.inf)
        forbidden[torch.from_numpy(allowed)] = 0.0
        log = range(position)
        masked = Sampler(params, log, vocab).next(logits, words(allowed, vocab))
        assert masked == Sampler(params, log, vocab).next(logits + forbidden)
        assert masked in allowed


def test_padded_logits_past_the_mask_are_never_chosen():
    logits = torch.zeros(100)
    logits[64:] = 10.0
    mask = torch.full((2,), -1, dtype=torch.int32)
    for params in (GREEDY, COUPLED, EVERYTHING):
        assert Sampler(params, [1], 100).next(logits, mask) < 64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("params", CONFIGURATIONS)
def test_any_float_dtype_is_read_as_float32(dtype, params):
    logits = torch.randn(3000, generator=torch.Generator().manual_seed(1)).to(dtype)
    once, again = (Sampler(params, [1], 3000) for _ in range(2))
    assert once.next(logits) == again.next(logits.float())


def test_rows_of_a_strided_batch_and_of_inference_mode_are_read_correctly():
    with torch.inference_mode():
        batch = torch.randn(VOCAB, 2).T
        assert Sampler(GREEDY, [], VOCAB).next(batch[1]) == int(batch[1].argmax())


def test_probabilities_are_the_distribution_that_next_samples_and_one_hot_when_greedy():
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(2))
    sampled = Sampler(EVERYTHING, [4, 5], VOCAB)
    p = sampled.probabilities(logits)
    assert p.dtype == torch.float64
    assert float(p.sum()) == pytest.approx(1.0)
    assert p[sampled.next(logits)] > 0
    greedy = Sampler(GREEDY, [], VOCAB)
    assert greedy.probabilities(logits).nonzero().flatten().tolist() == [greedy.next(logits)]
