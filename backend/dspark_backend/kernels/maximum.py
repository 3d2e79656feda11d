"""Maxima that vectorise: LLVM leaves one of floats serial, since NaNs are not ordered.

Read as integers, float32 values are ordered once the lower bits of the negative ones are flipped.
A NaN with a clear sign is above infinity there, so it shows in the result.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dspark_backend.kernels.jit import kernel

_MAGNITUDE = np.int32(0x7FFFFFFF)


@kernel
def largest(x: NDArray[np.float32]) -> np.float32:
    """The largest of ``x`` [n], n >= 1."""
    bits = x.view(np.int32)
    top = np.int32(-(2**31))
    for i in range(bits.shape[0]):
        ordered = np.int32(bits[i] ^ ((bits[i] >> np.int32(31)) & _MAGNITUDE))
        top = ordered if ordered > top else top
    return np.int32(top ^ ((top >> np.int32(31)) & _MAGNITUDE)).view(np.float32)


@kernel
def largest_magnitude(x: NDArray[np.float32]) -> np.float32:
    """The largest absolute value in ``x`` [n]; 0 for none."""
    bits = x.view(np.int32)
    top = np.int32(0)
    for i in range(bits.shape[0]):
        magnitude = np.int32(bits[i] & _MAGNITUDE)
        top = magnitude if magnitude > top else top
    return np.int32(top).view(np.float32)
