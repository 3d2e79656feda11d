"""SwiGLU's gate on the device, in float32 between the two products; oracle: ``reference.py``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dspark_backend.kernels.contract import FLOATS, describe
from dspark_backend.kernels.device import device_kernel

BLOCK = 1024
"""Columns of a program."""


def silu_mul(gate_up: Tensor) -> Tensor:
    """``gate_up`` [R, 2f] of a float dtype -> ``silu(gate) * up`` [R, f] of the same.

    Raises ValueError for others than these.
    """
    if gate_up.dim() != 2 or gate_up.dtype not in FLOATS or not gate_up.is_contiguous():
        raise ValueError(f"gate_up is [R, 2f] of a float dtype, not {describe(gate_up)}")
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        _silu_mul[(rows, triton.cdiv(width, BLOCK))](gate_up, out, width, BLOCK=BLOCK)
    return out


@device_kernel
def _silu_mul(
    gate_up: tl.tensor,
    out: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    row = tl.program_id(0).to(tl.int64)
    at = gate_up + 2 * row * width + column
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
    small = tl.exp(-tl.abs(gate))  # at most 1: nothing overflows
    sigmoid = tl.where(gate >= 0.0, 1.0, small) / (1.0 + small)
    gated = gate * sigmoid * up
    tl.store(out + row * width + column, gated.to(out.dtype.element_ty), mask=inside)
