"""Residual addition and RMS normalisation in one pass over a row; oracle: ``reference.py``."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dspark_backend.kernels.jit import kernel


@kernel
def rms_norm(
    x: NDArray[np.float32], weight: NDArray[np.float32], eps: float, out: NDArray[np.float32]
) -> None:
    """``out[R, d] = x / rms(x) * weight``; ``out`` may alias ``x``."""
    rows, width = x.shape
    for r in range(rows):
        square = np.float32(0.0)
        for i in range(width):
            square += x[r, i] * x[r, i]
        inverse = np.float32(1.0 / np.sqrt(np.float64(square) / width + eps))
        for i in range(width):
            out[r, i] = x[r, i] * inverse * weight[i]


@kernel
def add_rms_norm(
    x: NDArray[np.float32],
    delta: NDArray[np.float32],
    weight: NDArray[np.float32],
    eps: float,
    out: NDArray[np.float32],
) -> None:
    """``x += delta`` in place, then ``out = x / rms(x) * weight``; all [R, d] float32."""
    rows, width = x.shape
    for r in range(rows):
        square = np.float32(0.0)
        for i in range(width):
            value = x[r, i] + delta[r, i]
            x[r, i] = value
            square += value * value
        inverse = np.float32(1.0 / np.sqrt(np.float64(square) / width + eps))
        for i in range(width):
            out[r, i] = x[r, i] * inverse * weight[i]
