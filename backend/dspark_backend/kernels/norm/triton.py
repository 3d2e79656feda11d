"""RMS normalisation on the device, after a residual addition where there is one; one program a row,
so that a row's bits depend on that row alone. Oracle: ``reference.py``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dspark_backend.kernels.contract import FLOATS, describe, expect
from dspark_backend.kernels.device import device_kernel


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, delta: Tensor | None = None
) -> Tensor:
    """``x / rms(x) * weight`` as ``dtype`` [R, d], after ``x += delta`` where there is a delta.

    ``x`` float32 [R, d], written to only by that addition; ``weight`` float32 [d]; ``delta`` [R, d]
    of any float dtype. Sums are of float32. Raises ValueError for others than these.
    """
    rows, width = x.shape
    expect("x", x, x.device, torch.float32, rows, width)
    expect("weight", weight, x.device, torch.float32, width)
    if delta is not None:
        if delta.dtype not in FLOATS:
            raise ValueError(f"delta is of a float dtype, not {describe(delta)}")
        expect("delta", delta, x.device, delta.dtype, rows, width)
    out = torch.empty(rows, width, dtype=dtype, device=x.device)
    if rows:
        _rms_norm[(rows,)](
            *(x, x if delta is None else delta, weight, out, eps),
            ADDS=delta is not None,
            WIDTH=width,
            PADDED=triton.next_power_of_2(width),
        )
    return out


@device_kernel
def _rms_norm(
    x: tl.tensor,
    delta: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    eps: tl.tensor,
    ADDS: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
    PADDED: tl.constexpr,  # noqa: N803
) -> None:
    column = tl.arange(0, PADDED)
    inside = column < WIDTH
    at = tl.program_id(0).to(tl.int64) * WIDTH + column
    value = tl.load(x + at, mask=inside, other=0.0)
    if ADDS:
        value += tl.load(delta + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(x + at, value, mask=inside)
    inverse = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / WIDTH + eps)
    scaled = value * inverse * tl.load(weight + column, mask=inside, other=0.0)
    tl.store(out + at, scaled.to(out.dtype.element_ty), mask=inside)
