"""The block attention kernel says what its reference says, whatever shares the call."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dspark_backend.kernels import jit
from dspark_backend.kernels.draft_attention.cpu import attend_block
from dspark_backend.kernels.draft_attention.reference import attend_block as reference

SHAPES = [
    (1, 4, 4, 16, 0),
    (5, 9, 3, 64, 37),
    (7, 14, 2, 10, 300),
    (4, 3, 1, 6, 1),
    (2, 2, 2, 33, 5),
]


def inputs(slots: int, heads: int, kv_heads: int, width: int, length: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(length)
    shapes = [
        (slots, heads, width),
        (kv_heads, length + 3, width),
        (kv_heads, length + 3, width),
        (kv_heads, slots, width),
        (kv_heads, slots, width),
    ]
    return [torch.randn(shape, generator=g) for shape in shapes]


def run(tensors: list[torch.Tensor], length: int) -> np.ndarray:
    q, keys, values, block_keys, block_values = [tensor.numpy() for tensor in tensors]
    out = np.empty_like(q)
    attend_block(q, keys, values, length, block_keys, block_values, out)
    return out


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_is_that_of_the_reference(shape: tuple[int, ...]) -> None:
    tensors, length = inputs(*shape), shape[-1]
    q, keys, values, block_keys, block_values = tensors
    expected = reference(q, keys, values, length, block_keys, block_values)
    np.testing.assert_allclose(run(tensors, length), expected.numpy(), rtol=2e-5, atol=2e-5)


def test_every_slot_sees_every_other() -> None:
    tensors = inputs(4, 2, 1, 8, 6)
    before = run(tensors, 6)
    tensors[4][0, 3] += 1.0
    assert (run(tensors, 6) != before).any(axis=(1, 2)).all()


def test_what_lies_past_the_context_is_not_seen() -> None:
    tensors = inputs(3, 2, 2, 8, 6)
    before = run(tensors, 6)
    tensors[1][:, 6:] = torch.nan
    tensors[2][:, 6:] = torch.nan
    np.testing.assert_array_equal(run(tensors, 6), before)


def test_the_number_of_threads_changes_no_bit() -> None:
    tensors = inputs(5, 9, 3, 64, 130)
    with jit.threads(1):
        alone = run(tensors, 130)
    with jit.threads(jit.default_threads()):
        np.testing.assert_array_equal(run(tensors, 130), alone)
