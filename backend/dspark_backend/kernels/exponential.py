"""A float32 exponential that vectorises: the C library's does not, and softmax is made of it."""

from __future__ import annotations

import numpy as np

from dspark_backend.kernels.jit import exact_kernel

_LOG2E = np.float32(1.4426950408889634)
# log 2 in two parts, so that x - n log 2 keeps its low bits (Cody and Waite 1980).
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)


@exact_kernel
def exp(x: np.float32) -> np.float32:
    """``e**x`` within 2 ulp for x in [-87, 88]; 0 below, the value at 88 above."""
    if x < np.float32(-87.0):
        return np.float32(0.0)
    x = min(x, np.float32(88.0))
    n = np.float32(np.floor(x * _LOG2E + np.float32(0.5)))
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
