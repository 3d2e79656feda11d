"""A draft block's attention on the CPU: to all of its context and to itself, both ways.

One work item a kv head, each row in its own fixed order, so that a block's bits do not depend on
what else is drafted. The context is left untouched: the block's keys and values stay apart. The
oracle is ``reference.py``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dspark_backend.kernels.attention.mix import mix
from dspark_backend.kernels.attention.scores import padded, score_keys, soften
from dspark_backend.kernels.jit import parallel_kernel, prange


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
    slots, heads, width = q.shape
    kv_heads = keys.shape[0]
    group = heads // kv_heads
    scale = np.float32(1.0 / np.sqrt(width))
    for h in prange(kv_heads):
        mine = q[:, h * group : (h + 1) * group].copy().reshape(slots * group, width)
        scores = np.empty((slots * group, padded(length) + padded(slots)), np.float32)
        mixed = np.zeros((slots * group, width), np.float32)
        if length:
            score_keys(mine, keys[h], length, scores)
        # Right after the context's: what was written past its end is of no use.
        score_keys(mine, block_keys[h], slots, scores[:, length:])
        for n in range(slots * group):
            soften(scores[n, : length + slots], scale)
        if length:
            mix(scores, values[h], length, mixed)
        for n in range(slots * group):
            for j in range(slots):
                for i in range(width):
                    mixed[n, i] += scores[n, length + j] * block_values[h, j, i]
        out[:, h * group : (h + 1) * group] = mixed.reshape(slots, group, width)
