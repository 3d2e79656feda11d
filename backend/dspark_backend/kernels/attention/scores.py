"""Scores of queries with cached keys: what verification, prefill and drafting have in common.

Keys are turned sixteen at a time, so that a lane is a key and nothing has to be summed across a
register; the queries of all heads and rows that read them share the turning.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dspark_backend.kernels.attention.tile import LANES, score_tile, turn_tile
from dspark_backend.kernels.exponential import exp
from dspark_backend.kernels.jit import kernel
from dspark_backend.kernels.maximum import largest

_turn_64, _turn_128 = turn_tile(64), turn_tile(128)
_score_1x64, _score_2x64, _score_3x64 = score_tile(1, 64), score_tile(2, 64), score_tile(3, 64)
_score_4x64, _score_7x64 = score_tile(4, 64), score_tile(7, 64)
_score_1x128, _score_2x128, _score_4x128 = (
    score_tile(1, 128),
    score_tile(2, 128),
    score_tile(4, 128),
)


@kernel
def padded(count: int) -> int:
    """Elements of a row of scores: :func:`score_keys` writes whole registers."""
    return (count + LANES - 1) // LANES * LANES


@kernel
def score_keys(
    q: NDArray[np.float32], keys: NDArray[np.float32], count: int, scores: NDArray[np.float32]
) -> None:
    """``scores[n, j] = q[n] . keys[j]`` for j < ``count``.

    ``q`` float32 [N, hd] and ``keys`` [>= count, hd], contiguous; ``scores`` [N, padded(count)],
    whose columns from ``count`` on hold nothing of use. ``count`` >= 1.
    """
    queries, width = q.shape
    if width != 64 and width != 128:
        for n in range(queries):
            for j in range(count):
                dot = np.float32(0.0)
                for i in range(width):
                    dot += q[n, i] * keys[j, i]
                scores[n, j] = dot
        return
    # Its address is asked for at every use: Numba frees an array after the last one, which a name
    # for the address would not be.
    turned = np.empty((width, LANES), np.float32)
    ldo = scores.strides[0] // 4
    for j in range(0, count, LANES):
        key, some = keys.ctypes.data + 4 * width * j, min(LANES, count - j)
        at, to, n = q.ctypes.data, scores.ctypes.data + 4 * j, queries
        if width == 64:
            _turn_64(key, some, turned.ctypes.data)
        else:
            _turn_128(key, some, turned.ctypes.data)
        while n > 0:
            done = _score_some(at, width, turned.ctypes.data, to, ldo, n)
            at += 4 * width * done
            to += 4 * ldo * done
            n -= done


@kernel
def _score_some(q: int, width: int, keys: int, out: int, ldo: int, left: int) -> int:
    """As many of the ``left`` queries as a tile takes; how many."""
    if width == 64:
        if left >= 7:
            _score_7x64(q, keys, out, ldo)
            return 7
        if left >= 4:
            _score_4x64(q, keys, out, ldo)
            return 4
        if left == 3:
            _score_3x64(q, keys, out, ldo)
            return 3
        if left == 2:
            _score_2x64(q, keys, out, ldo)
            return 2
        _score_1x64(q, keys, out, ldo)
        return 1
    if left >= 4:
        _score_4x128(q, keys, out, ldo)
        return 4
    if left >= 2:
        _score_2x128(q, keys, out, ldo)
        return 2
    _score_1x128(q, keys, out, ldo)
    return 1


@kernel
def soften(scores: NDArray[np.float32], scale: np.float32) -> None:
    """``scores`` [count] -> softmax(scores * scale), in place."""
    top = largest(scores)
    total = np.float32(0.0)
    for j in range(scores.shape[0]):
        weight = exp((scores[j] - top) * scale)
        scores[j] = weight
        total += weight
    inverse = np.float32(1.0) / total
    for j in range(scores.shape[0]):
        scores[j] *= inverse
