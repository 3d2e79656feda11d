"""Attention against float64, and a row's independence of the rows beside it."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dspark_backend.kernels.attention.cpu import attend
from dspark_backend.kernels.attention.reference import attend as attend_reference

Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
HEADS = [(9, 3, 64), (14, 2, 64), (6, 2, 128), (4, 4, 20)]


def run(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor
) -> NDArray[np.float32]:
    return together([(q, keys, values, positions)])


def together(sequences: list[Case]) -> NDArray[np.float32]:
    """One call for all of them."""
    ends = np.cumsum([len(positions) for *_, positions in sequences])
    caches = [(keys.numpy(), values.numpy()) for _, keys, values, _ in sequences]
    q = np.concatenate([q.numpy() for q, *_ in sequences])
    out = np.full(q.shape, np.nan, np.float32)
    attend(
        q,
        np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1),
        np.array([keys.ctypes.data for keys, _ in caches]),
        np.array([values.ctypes.data for _, values in caches]),
        np.array([keys.shape[1] for keys, _ in caches]),
        caches[0][0].shape[0],
        np.concatenate([positions.numpy() for *_, positions in sequences]),
        out,
    )
    return out


def case(heads: int, kv_heads: int, width: int, positions: list[int]) -> Case:
    rng = torch.Generator().manual_seed(heads * 100 + width)
    capacity = max(positions) + 9
    keys, values = torch.randn(2, kv_heads, capacity, width, generator=rng)
    # What lies past a row's position must not matter.
    keys[:, max(positions) + 1 :] = float("nan")
    values[:, max(positions) + 1 :] = float("nan")
    q = torch.randn(len(positions), heads, width, generator=rng) * 2
    return q, keys, values, torch.tensor(positions)


@pytest.mark.parametrize("positions", [[0], [63], [64, 65, 66], [300], list(range(40))], ids=len)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width"), [(9, 3, 64), (14, 2, 64), (6, 2, 128), (4, 4, 20)]
)
def test_matches_float64(heads: int, kv_heads: int, width: int, positions: list[int]) -> None:
    inputs = case(heads, kv_heads, width, positions)
    expected = attend_reference(*inputs).float()
    torch.testing.assert_close(torch.from_numpy(run(*inputs)), expected, rtol=2e-5, atol=2e-6)


def test_huge_scores_stay_finite() -> None:
    q, keys, values, positions = case(4, 2, 16, [30, 31])
    q *= 1e4
    expected = attend_reference(q, keys, values, positions).float()
    torch.testing.assert_close(
        torch.from_numpy(run(q, keys, values, positions)), expected, rtol=1e-4, atol=1e-5
    )


def test_a_row_has_the_same_bits_in_any_company() -> None:
    q, keys, values, positions = case(6, 2, 64, list(range(100, 116)))
    together = run(q, keys, values, positions)
    for rows in (1, 3, 8):
        for first in range(0, 16, rows):
            span = slice(first, first + rows)
            np.testing.assert_array_equal(
                run(q[span], keys, values, positions[span]), together[span]
            )


def test_capacity_does_not_change_bits() -> None:
    q, keys, values, positions = case(6, 2, 64, [70])
    wider = [torch.cat([t, torch.randn(2, 50, 64)], dim=1) for t in (keys, values)]
    np.testing.assert_array_equal(run(q, keys, values, positions), run(q, *wider, positions))


@pytest.mark.parametrize(("heads", "kv_heads", "width"), HEADS)
def test_sequences_together_have_the_bits_of_each_alone(
    heads: int, kv_heads: int, width: int
) -> None:
    """Of different lengths, capacities and numbers of rows, one of them a chunk of a prompt."""
    sequences = [
        case(heads, kv_heads, width, positions)
        for positions in ([5], [64, 65, 66], list(range(30)), [0], list(range(17, 24)))
    ]
    alone = np.concatenate([run(*each) for each in sequences])
    np.testing.assert_array_equal(together(sequences), alone)


_MANY_PASSES = """
import numpy as np
from dspark_backend.kernels import jit
from dspark_backend.kernels.attention.cpu import attend
rng = np.random.default_rng(0)
rows, heads, capacity = 64, 14, 380
q = rng.standard_normal((rows, heads, 64)).astype(np.float32)
keys, values = rng.standard_normal((2, 2, capacity, 64)).astype(np.float32)
def run():
    out = np.empty_like(q)
    attend(q, np.array([[0, rows]]), np.array([keys.ctypes.data]), np.array([values.ctypes.data]),
           np.array([capacity]), 2, np.arange(300, 300 + rows), out)
    return out
with jit.threads(1):
    alone = run()
with jit.threads(2):
    assert all(np.array_equal(run(), alone) for _ in range(200))
"""


def test_threads_that_share_a_heap_do_not_write_to_each_others_buffers() -> None:
    """With one heap, what a thread frees too early is at once another's (glibc)."""
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _MANY_PASSES], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
