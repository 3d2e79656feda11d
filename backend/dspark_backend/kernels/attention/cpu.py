"""Causal attention on the CPU: one work item a kv head and a few rows, which share its keys.

A row's result depends on its query and its own sequence only, so decoding, verification and
chunked prefill agree bit for bit. The oracle is ``reference.py``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dspark_backend.kernels.address import floats_at
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


@kernel
def _piece(
    q: NDArray[np.float32],
    keys: NDArray[np.float32],
    values: NDArray[np.float32],
    positions: NDArray[np.int64],
    h: int,
    out: NDArray[np.float32],
) -> None:
    """At most ``_TOGETHER`` rows of one sequence, for kv head ``h``; arguments as :func:`attend`'s,
    for those rows."""
    rows, heads, width = q.shape
    group = heads // keys.shape[0]
    seen = positions + 1
    mine = q[:, h * group : (h + 1) * group].copy()
    scores = np.empty((rows, group, padded(seen.max())), np.float32)
    mixed = np.empty((rows, group, width), np.float32)
    _rows(mine, keys[h], values[h], seen, scores, mixed)
    out[:, h * group : (h + 1) * group] = mixed


@parallel_kernel
def attend(
    q: NDArray[np.float32],
    spans: NDArray[np.int64],
    keys_at: NDArray[np.int64],
    values_at: NDArray[np.int64],
    capacities: NDArray[np.int64],
    kv_heads: int,
    positions: NDArray[np.int64],
    out: NDArray[np.float32],
) -> None:
    """The rows of a pass, each over the cache of its sequence, in one call: a call for each
    sequence costs as much as a short context.

    ``q`` float32 [R, H, hd]. Rows ``spans[s, 0]`` to ``spans[s, 1]`` are sequence s's, whose
    float32 keys and values [kv_heads, capacities[s], hd] lie, contiguous, at the addresses
    ``keys_at[s]`` and ``values_at[s]``. ``positions`` int64 [R], which rise within a sequence: row
    r sees cache positions <= positions[r]. ``out`` [R, H, hd], must not alias ``q``.
    """
    sequences, width = spans.shape[0], q.shape[2]
    pieces = np.zeros(sequences + 1, np.int64)
    for s in range(sequences):
        rows = spans[s, 1] - spans[s, 0]
        pieces[s + 1] = pieces[s] + (rows + _TOGETHER - 1) // _TOGETHER
    owners = np.empty(pieces[sequences], np.int64)
    for s in range(sequences):
        owners[pieces[s] : pieces[s + 1]] = s
    for item in prange(pieces[sequences] * kv_heads):
        # Pieces in reverse: of a sequence the longest first, so that the threads end together.
        piece, h = pieces[sequences] - 1 - item // kv_heads, item % kv_heads
        s = owners[piece]
        shape = (kv_heads, capacities[s], width)
        keys = floats_at(keys_at[s], shape)
        values = floats_at(values_at[s], shape)
        first = spans[s, 0] + (piece - pieces[s]) * _TOGETHER
        last = min(spans[s, 1], first + _TOGETHER)
        _piece(q[first:last], keys, values, positions[first:last], h, out[first:last])
