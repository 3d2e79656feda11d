"""Split the fused projection, normalise heads where the family does, rotate, write the KV cache."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dspark_backend.kernels.jit import kernel


@kernel
def _head(
    source: NDArray[np.float32],
    weight: NDArray[np.float32],
    eps: float,
    cos: NDArray[np.float32],
    sin: NDArray[np.float32],
    out: NDArray[np.float32],
) -> None:
    width = source.shape[0]
    half = width // 2
    inverse = np.float32(1.0)
    if weight.shape[0] > 0:
        square = np.float32(0.0)
        for i in range(width):
            square += source[i] * source[i]
        inverse = np.float32(1.0 / np.sqrt(np.float64(square) / width + eps))
    for i in range(half):
        a, b = source[i], source[half + i]
        if weight.shape[0] > 0:
            a, b = a * inverse * weight[i], b * inverse * weight[half + i]
        out[i] = a * cos[i] - b * sin[i]
        out[half + i] = b * cos[i] + a * sin[i]


@kernel
def rope_append(
    qkv: NDArray[np.float32],
    positions: NDArray[np.int64],
    cos: NDArray[np.float32],
    sin: NDArray[np.float32],
    q_norm: NDArray[np.float32],
    k_norm: NDArray[np.float32],
    eps: float,
    q: NDArray[np.float32],
    keys: NDArray[np.float32],
    values: NDArray[np.float32],
) -> None:
    """For the rows of one sequence, rotate queries into ``q`` and append keys and values.

    ``qkv`` float32 [R, (H + 2 Hkv) hd]; ``positions`` int64 [R]; ``cos``, ``sin`` float32
    [positions, hd / 2] tables; ``q_norm``, ``k_norm`` float32 [hd], or [0] where the family has
    none; ``q`` [R, H, hd]; ``keys``, ``values`` [Hkv, capacity, hd], written at ``positions``.
    """
    heads, width = q.shape[1], q.shape[2]
    kv_heads = keys.shape[0]
    for r in range(qkv.shape[0]):
        p = positions[r]
        for h in range(heads):
            _head(qkv[r, h * width : (h + 1) * width], q_norm, eps, cos[p], sin[p], q[r, h])
        for h in range(kv_heads):
            at = (heads + h) * width
            _head(qkv[r, at : at + width], k_norm, eps, cos[p], sin[p], keys[h, p])
            at += kv_heads * width
            values[h, p, :] = qkv[r, at : at + width]
