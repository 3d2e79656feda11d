"""Weighted sums of cached values: the other half of attention."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dspark_backend.kernels.attention.tile import mix_tile
from dspark_backend.kernels.jit import kernel

_mix_4x64, _mix_3x64 = mix_tile(4, 64), mix_tile(3, 64)
_mix_2x64, _mix_1x64 = mix_tile(2, 64), mix_tile(1, 64)
_mix_2x128, _mix_1x128 = mix_tile(2, 128), mix_tile(1, 128)


@kernel
def mix(
    scores: NDArray[np.float32], values: NDArray[np.float32], seen: int, out: NDArray[np.float32]
) -> None:
    """``out[g] = sum over j < seen of scores[g, j] * values[j]``, in the order of the positions.

    ``scores`` float32 [group, >= seen]; ``values`` [>= seen, hd]; ``out`` [group, hd]; contiguous.
    ``seen`` >= 1.
    """
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
        elif width == 64 and group - g == 3:
            _mix_3x64(at, ldw, value, seen, here, 0)
            g += 3
        elif width == 64 and group - g == 2:
            _mix_2x64(at, ldw, value, seen, here, 0)
            g += 2
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
