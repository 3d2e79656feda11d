"""Causal attention on the CPU: one work item a kv head and a few rows, which share its keys.

A row's result depends on its query and its own sequence only, so decoding, verification and
chunked prefill agree bit for bit. The oracle is ``reference.py``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dspark_backend.kernels.attention.mix import mix
from dspark_backend.kernels.attention.scores import padded, score_keys, soften
from dspark_backend.kernels.jit import kernel, parallel_kernel, prange

# Rows that share the turning of a key: a block of drafts and its anchor, and few enough that the
# scores of a long context stay in the second-level cache.
_TOGETHER = 6


@kernel
def _rows(
    q: NDArray[np.float32],
    keys: NDArray[np.float32],
    values: NDArray[np.float32],
    seen: NDArray[np.int64],
    scores: NDArray[np.float32],
    out: NDArray[np.float32],
) -> None:
    """Some rows of one kv head. ``q`` [N, group, hd], contiguous; ``out`` [N, group, hd];
    ``keys``, ``values`` [capacity, hd]; ``seen`` [N]; ``scores`` [N, group, >= the most seen]."""
    rows, group, width = q.shape
    scale = np.float32(1.0 / np.sqrt(width))
    score_keys(
        q.reshape(rows * group, width), keys, seen.max(),
        scores.reshape(rows * group, scores.shape[2]),
    )  # fmt: skip
    for r in range(rows):
        for g in range(group):
            soften(scores[r, g, : seen[r]], scale)
        mix(scores[r], values, seen[r], out[r])


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
    rows, heads, width = q.shape
    kv_heads = keys.shape[0]
    group = heads // kv_heads
    pieces = (rows + _TOGETHER - 1) // _TOGETHER
    for item in prange(pieces * kv_heads):
        # Pieces in reverse: the longest first, so that the threads end together.
        piece, h = pieces - 1 - item // kv_heads, item % kv_heads
        first, last = piece * _TOGETHER, min(rows, (piece + 1) * _TOGETHER)
        seen = positions[first:last] + 1
        mine = q[first:last, h * group : (h + 1) * group].copy()
        scores = np.empty((last - first, group, padded(seen.max())), np.float32)
        mixed = np.empty((last - first, group, width), np.float32)
        _rows(mine, keys[h], values[h], seen, scores, mixed)
        out[first:last, h * group : (h + 1) * group] = mixed
