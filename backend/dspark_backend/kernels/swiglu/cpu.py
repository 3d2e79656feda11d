"""SwiGLU's gate on the CPU. The oracle is ``reference.py``."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dspark_backend.kernels.exponential import exp
from dspark_backend.kernels.jit import exact_kernel, parallel_kernel, prange

_CHUNK = 1024


@exact_kernel
def _gated(gate: NDArray[np.float32], up: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    # Slices, since LLVM vectorises loops over arrays that begin where the loop does.
    for i in range(out.shape[0]):
        out[i] = gate[i] / (np.float32(1.0) + exp(-gate[i])) * up[i]


@parallel_kernel
def silu_mul(gate_up: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """``gate_up`` float32 [R, 2f] -> ``out`` [R, f] = gate * sigmoid(gate) * up."""
    rows, width = out.shape
    chunks = (width + _CHUNK - 1) // _CHUNK
    for item in prange(rows * chunks):
        r, first = item // chunks, (item % chunks) * _CHUNK
        last = min(width, first + _CHUNK)
        up = gate_up[r, width + first : width + last]
        _gated(gate_up[r, first:last], up, out[r, first:last])
