"""Causal attention on the CPU: one work item a (row, kv head), each in its own fixed order.

A row's result depends on its query and its own sequence only, so decoding, verification and
chunked prefill agree bit for bit. The oracle is ``reference.py``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dspark_backend.kernels.exponential import exp
from dspark_backend.kernels.jit import kernel, parallel_kernel, prange


@kernel
def _row(
    q: NDArray[np.float32],
    keys: NDArray[np.float32],
    values: NDArray[np.float32],
    seen: int,
    scores: NDArray[np.float32],
    out: NDArray[np.float32],
) -> None:
    """``q``, ``out`` [group, hd]; ``keys``, ``values`` [capacity, hd]; ``scores`` [group, seen]."""
    group, width = q.shape
    scale = np.float32(1.0 / np.sqrt(width))
    for j in range(seen):
        for g in range(group):
            dot = np.float32(0.0)
            for i in range(width):
                dot += q[g, i] * keys[j, i]
            scores[g, j] = dot * scale
    for g in range(group):
        top = scores[g, 0]
        for j in range(1, seen):
            top = max(top, scores[g, j])
        total = np.float32(0.0)
        for j in range(seen):
            weight = exp(scores[g, j] - top)
            scores[g, j] = weight
            total += weight
        inverse = np.float32(1.0) / total
        for i in range(width):
            out[g, i] = np.float32(0.0)
        for j in range(seen):
            weight = scores[g, j] * inverse
            for i in range(width):
                out[g, i] += weight * values[j, i]


@parallel_kernel
def attend(
    q: NDArray[np.float32],
    keys: NDArray[np.float32],
    values: NDArray[np.float32],
    positions: NDArray[np.int64],
    out: NDArray[np.float32],
) -> None:
    """Rows of one sequence over its cache.

    ``q`` float32 [R, H, hd]; ``keys``, ``values`` [Hkv, capacity, hd]; ``positions`` int64 [R]:
    row r sees cache positions <= positions[r]; ``out`` [R, H, hd], must not alias ``q``.
    """
    rows, heads, _ = q.shape
    kv_heads = keys.shape[0]
    group = heads // kv_heads
    for item in prange(rows * kv_heads):
        # Rows in reverse: the longest first, so that the threads end together.
        r, h = rows - 1 - item // kv_heads, item % kv_heads
        seen = positions[r] + 1
        scores = np.empty((group, seen), np.float32)
        first, last = h * group, (h + 1) * group
        _row(q[r, first:last], keys[h], values[h], seen, scores, out[r, first:last])
