"""A draft block's attention on the CPU: to all of its context and to itself, both ways.

One work item a (slot, kv head), each in its own fixed order, so that a block's bits do not depend
on what else is drafted. The context is left untouched: the block's keys and values stay apart. The
oracle is ``reference.py``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dspark_backend.kernels.exponential import exp
from dspark_backend.kernels.jit import kernel, parallel_kernel, prange


@kernel
def _scores(
    q: NDArray[np.float32], keys: NDArray[np.float32], count: int, out: NDArray[np.float32]
) -> None:
    """``out[g, j] = q[g] . keys[j] / sqrt(hd)``; ``q`` [group, hd], ``keys`` [>= count, hd]."""
    group, width = q.shape
    scale = np.float32(1.0 / np.sqrt(width))
    for j in range(count):
        for g in range(group):
            dot = np.float32(0.0)
            for i in range(width):
                dot += q[g, i] * keys[j, i]
            out[g, j] = dot * scale


@kernel
def _softmax(scores: NDArray[np.float32]) -> None:
    """In place, row by row."""
    group, count = scores.shape
    for g in range(group):
        top = scores[g, 0]
        for j in range(1, count):
            top = max(top, scores[g, j])
        total = np.float32(0.0)
        for j in range(count):
            weight = exp(scores[g, j] - top)
            scores[g, j] = weight
            total += weight
        inverse = np.float32(1.0) / total
        for j in range(count):
            scores[g, j] *= inverse


@kernel
def _mix(
    weights: NDArray[np.float32], values: NDArray[np.float32], count: int, out: NDArray[np.float32]
) -> None:
    """``out[g] += weights[g] @ values``."""
    group, width = out.shape
    for g in range(group):
        for j in range(count):
            weight = weights[g, j]
            for i in range(width):
                out[g, i] += weight * values[j, i]


@parallel_kernel
def attend_block(
    q: NDArray[np.float32],
    keys: NDArray[np.float32],
    values: NDArray[np.float32],
    length: int,
    block_keys: NDArray[np.float32],
    block_values: NDArray[np.float32],
    out: NDArray[np.float32],
) -> None:
    """The slots of one block.

    ``q``, ``out`` float32 [g, H, hd] (no aliases); ``keys``, ``values`` [Hkv, capacity, hd] with
    ``length`` positions of context; ``block_keys``, ``block_values`` [Hkv, g, hd].
    """
    slots, heads, _ = q.shape
    kv_heads = keys.shape[0]
    group = heads // kv_heads
    for item in prange(slots * kv_heads):
        slot, h = item // kv_heads, item % kv_heads
        first, last = h * group, (h + 1) * group
        weights = np.empty((group, length + slots), np.float32)
        _scores(q[slot, first:last], keys[h], length, weights[:, :length])
        _scores(q[slot, first:last], block_keys[h], slots, weights[:, length:])
        _softmax(weights)
        mixed = out[slot, first:last]
        mixed[:] = np.float32(0.0)
        _mix(weights[:, :length], values[h], length, mixed)
        _mix(weights[:, length:], block_values[h], slots, mixed)
