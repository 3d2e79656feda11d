"""The quantised linear layer as maths, in exact integers and float64: the oracle of ``cpu.py``."""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = {1: 127, 2: 127 * 256 + 255}  # largest magnitude of an activation with 1 or 2 planes


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 per output channel.

    ``weight`` [N, K] float -> (int8 [N, K], scale float32 [N]) with ``weight ~ q * scale``.
    """
    w = weight.float()
    scale = (w.abs().amax(dim=1) / 127).clamp_min(1e-12)
    return (w / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def quantise_rows(x: Tensor, planes: int) -> tuple[Tensor, Tensor]:
    """Symmetric integers per row: 8 bits with one plane, 16 bits with two.

    ``x`` [R, K] float32 -> (int32 [R, K], scale float32 [R]), ``x ~ q * scale``.
    """
    levels = LEVELS[planes]
    scale = x.abs().amax(dim=1) / torch.tensor(levels, dtype=torch.float32)
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    return (x * inverse[:, None]).round().clamp(-levels, levels).to(torch.int32), scale


def linear_int8(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, planes: int
) -> Tensor:
    """``x`` [R, K] float32 times int8 ``weight`` [N, K] with ``scale`` [N]: [R, N] float32."""
    q, row_scale = quantise_rows(x, planes)
    exact = q.double() @ weight.double().T
    out = exact * (row_scale[:, None] * scale[None, :]).double()
    return (out if bias is None else out + bias.double()).float()
