"""How the int8 kernel stores a matrix: panels of 32 output channels, four inputs of each together.

A panel holds ``[Kp / 4, 32, 4]`` bytes: 64 consecutive bytes are four inputs of sixteen channels,
the operand of one ``vpdpbusd``, whose sixteen sums are then one channel each. So nothing has to be
summed across a register, and the whole matrix is one stream, whatever the number of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

PANEL = 32  # channels in a panel: the int32 lanes of two 512-bit registers
QUAD = 4  # inputs that one lane multiplies at a time
DEPTH_STEP = 64  # inputs are padded to a multiple of this: the tile unrolls over them


def padded_depth(k: int) -> int:
    """``k`` inputs rounded up to what the tile reads at a time."""
    return -(-k // DEPTH_STEP) * DEPTH_STEP


def panels_of(channels: int) -> int:
    """How many panels hold that many output channels."""
    return -(-channels // PANEL)


def panels_shape(channels: int, depth: int) -> tuple[int, int]:
    """``[P, PANEL * Kp]``: the shape of :func:`pack`'s result."""
    return panels_of(channels), PANEL * padded_depth(depth)


def pack(weight: Tensor) -> Tensor:
    """``weight`` int8 [N, K] -> int8 [P, PANEL * Kp], zeros where there is no channel or input."""
    channels, depth = weight.shape
    count, wide = panels_of(channels), padded_depth(depth)
    padding = (0, wide - depth, 0, count * PANEL - channels)
    full = torch.nn.functional.pad(weight, padding)
    quads = full.view(count, PANEL, wide // QUAD, QUAD).transpose(1, 2)
    return quads.reshape(count, PANEL * wide).contiguous()


def unpack(panels: Tensor, channels: int, depth: int) -> Tensor:
    """The inverse of :func:`pack`: int8 [N, K]."""
    count = len(panels)
    quads = panels.view(count, -1, PANEL, QUAD).transpose(1, 2)
    return quads.reshape(count * PANEL, -1)[:channels, :depth].contiguous()
