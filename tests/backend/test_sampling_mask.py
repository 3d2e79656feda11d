"""Grammar bitmasks against a bit-by-bit reading."""

import llguidance
import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from dspark_backend.grammar.bitmask import is_allowed
from dspark_backend.sampling.mask import penalties, unpack

words = st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=6)


def bits(mask, vocab):
    """Bit v of the mask, read off Python integers."""
    return [v // 32 < len(mask) and bool(mask[v // 32] >> (v % 32) & 1) for v in range(vocab)]


@given(words, st.integers(1, 250))
def test_every_reading_of_a_mask_agrees(mask, vocab):
    """``vocab`` is shorter than the mask, inside its last word, or longer (padded logits)."""
    tensor, expected = torch.tensor(mask, dtype=torch.int32), bits(mask, vocab)
    assert unpack(tensor, vocab).tolist() == expected
    assert [is_allowed(tensor, v) for v in range(vocab)] == expected
    assert (penalties(tensor, vocab) == 0.0).tolist() == expected
    assert np.isneginf(penalties(tensor, vocab)).tolist() == [not bit for bit in expected]


def test_a_row_of_a_batch_of_masks_is_read_in_place():
    batch = torch.tensor([[1, 0], [0, -1]], dtype=torch.int32)
    assert unpack(batch[1], 64).tolist() == [False] * 32 + [True] * 32


def test_llguidance_writes_the_layout_that_is_read_here():
    tokenizer = llguidance.LLTokenizer("byte")
    matcher = llguidance.LLMatcher(tokenizer, llguidance.grammar_from("regex", "[a-c]"))
    mask = torch.from_numpy(np.frombuffer(matcher.compute_bitmask(), dtype=np.int32).copy())
    assert np.flatnonzero(unpack(mask, tokenizer.vocab_size)).tolist() == [97, 98, 99]
