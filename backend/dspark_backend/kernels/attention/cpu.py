"""Causal attention on the CPU: one work item a (row, kv head), each in its own fixed order.

A row's result depends on its query and its own sequence only, so decoding, verification and
chunked prefill agree bit for bit. The oracle is ``reference.py``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dspark_backend.kernels.attention.tile import mix_tile, score_tile
from dspark_backend.kernels.exponential import exp
from dspark_backend.kernels.jit import kernel, parallel_kernel, prange
from dspark_backend.kernels.maximum import largest

_score_4x64, _score_1x64 = score_tile(4, 64), score_tile(1, 64)
_score_2x128, _score_1x128 = score_tile(2, 128), score_tile(1, 128)
_mix_4x64, _mix_1x64 = mix_tile(4, 64), mix_tile(1, 64)
_mix_2x128, _mix_1x128 = mix_tile(2, 128), mix_tile(1, 128)


@kernel
def _scores(
    q: NDArray[np.float32], keys: NDArray[np.float32], seen: int, scores: NDArray[np.float32]
) -> None:
    group, width = q.shape
    query, key, out, ldo = q.ctypes.data, keys.ctypes.data, scores.ctypes.data, scores.shape[1]
    g = 0
    while g < group:
        at, to = query + 4 * g * width, out + 4 * g * ldo
        if width == 64 and group - g >= 4:
            _score_4x64(at, key, seen, to, ldo, 0)
            g += 4
        elif width == 64:
            _score_1x64(at, key, seen, to, ldo, 0)
            g += 1
        elif width == 128 and group - g >= 2:
            _score_2x128(at, key, seen, to, ldo, 0)
            g += 2
        elif width == 128:
            _score_1x128(at, key, seen, to, ldo, 0)
            g += 1
        else:
            for j in range(seen):
                dot = np.float32(0.0)
                for i in range(width):
                    dot += q[g, i] * keys[j, i]
                scores[g, j] = dot
            g += 1


@kernel
def _mix(
    scores: NDArray[np.float32], values: NDArray[np.float32], seen: int, out: NDArray[np.float32]
) -> None:
    group, width = out.shape
    weights, ldw, value, to = (
        scores.ctypes.data,
        scores.shape[1],
        values.ctypes.data,
        out.ctypes.data,
    )
    g = 0
    while g < group:
        at, here = weights + 4 * g * ldw, to + 4 * g * width
        if width == 64 and group - g >= 4:
            _mix_4x64(at, ldw, value, seen, here, 0)
            g += 4
        elif width == 64:
            _mix_1x64(at, ldw, value, seen, here, 0)
            g += 1
        elif width == 128 and group - g >= 2:
            _mix_2x128(at, ldw, value, seen, here, 0)
            g += 2
        elif width == 128:
            _mix_1x128(at, ldw, value, seen, here, 0)
            g += 1
        else:
            for i in range(width):
                out[g, i] = np.float32(0.0)
            for j in range(seen):
                for i in range(width):
                    out[g, i] += scores[g, j] * values[j, i]
            g += 1


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
    scale = np.float32(1.0 / np.sqrt(q.shape[1]))
    _scores(q, keys, seen, scores)
    for g in range(q.shape[0]):
        top = largest(scores[g, :seen])
        total = np.float32(0.0)
        for j in range(seen):
            weight = exp((scores[g, j] - top) * scale)
            scores[g, j] = weight
            total += weight
        inverse = np.float32(1.0) / total
        for j in range(seen):
            scores[g, j] *= inverse
    _mix(scores, values, seen, out)


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
