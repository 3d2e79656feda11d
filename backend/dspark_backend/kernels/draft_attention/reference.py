"""A block's attention over its context and itself, in float64: the oracle of ``cpu.py``."""

from __future__ import annotations

import torch
from torch import Tensor


def attend_block(
    q: Tensor, keys: Tensor, values: Tensor, length: int, block_keys: Tensor, block_values: Tensor
) -> Tensor:
    """``q`` [g, H, hd]; ``keys``, ``values`` [Hkv, capacity, hd], of which the first ``length``
    positions are the context; ``block_keys``, ``block_values`` [Hkv, g, hd].

    No causal mask (DSPARK.md, section 2). Scale hd^-0.5. Returns float64 [g, H, hd].
    """
    heads, width = q.shape[1:]
    k = torch.cat([keys[:, :length], block_keys], dim=1).double()
    v = torch.cat([values[:, :length], block_values], dim=1).double()
    shared = torch.arange(heads) // (heads // keys.shape[0])
    scores = torch.einsum("ghd,hkd->hgk", q.double(), k[shared]) * width**-0.5
    return torch.einsum("hgk,hkd->ghd", torch.softmax(scores, dim=-1), v[shared])
