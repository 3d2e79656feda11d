"""Causal attention of new rows over their own sequence, in float64: the oracle of ``cpu.py``."""

from __future__ import annotations

import torch
from torch import Tensor


def attend(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """``q`` [R, H, hd], ``keys``/``values`` [Hkv, capacity, hd]; row r sees up to positions[r].

    Grouped queries (Ainslie et al. 2023): query head h reads kv head h // (H / Hkv). Scale
    hd^-0.5. Returns float64 [R, H, hd].
    """
    rows, heads, width = q.shape
    group = heads // keys.shape[0]
    out = torch.empty(rows, heads, width, dtype=torch.float64)
    for r in range(rows):
        seen = int(positions[r]) + 1
        for h in range(heads):
            k, v = keys[h // group, :seen].double(), values[h // group, :seen].double()
            weights = torch.softmax(k @ q[r, h].double() * width**-0.5, dim=0)
            out[r, h] = weights @ v
    return out
