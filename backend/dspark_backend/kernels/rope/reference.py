"""Rotary position embedding (Su et al. 2021) as the Llama family halves heads, in float64."""

from __future__ import annotations

from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x`` [R, H, hd]; ``cos``, ``sin`` [R, hd / 2] of the rows' positions: float64 [R, H, hd]."""
    first, second = x.double().chunk(2, dim=-1)
    c, s = cos.double()[:, None, :], sin.double()[:, None, :]
    out = x.double().clone()
    half = x.shape[-1] // 2
    out[..., :half] = first * c - second * s
    out[..., half:] = second * c + first * s
    return out
