"""SwiGLU's gate on the CPU. The oracle is ``reference.py``."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dspark_backend.kernels.exponential import exp
from dspark_backend.kernels.jit import parallel_kernel, prange

_CHUNK = 1024


@parallel_kernel
def silu_mul(gate_up: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """``gate_up`` float32 [R, 2f] -> ``out`` [R, f] = gate * sigmoid(gate) * up."""
    rows, width = out.shape
    chunks = (width + _CHUNK - 1) // _CHUNK
    for item in prange(rows * chunks):
        r, first = item // chunks, (item % chunks) * _CHUNK
        for i in range(first, min(width, first + _CHUNK)):
            gate = gate_up[r, i]
            out[r, i] = gate / (np.float32(1.0) + exp(-gate)) * gate_up[r, width + i]
