"""Ragged attention row by row in torch float64: the oracle of ``triton.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from dspark_backend.kernels.ragged_attention.contract import Batch, Sight


def attend(batch: Batch) -> Tensor:
    """softmax(K q hd^-0.5) V over the positions that each row sees, float64 [R, H, hd].

    Grouped queries (Ainslie et al. 2023): query head h reads kv head h // (H / Hkv).
    """
    heads, width = batch.q.shape[1:]
    shared = torch.arange(heads, device=batch.q.device) // (heads // batch.keys.shape[1])
    out = torch.empty(batch.q.shape, dtype=torch.float64, device=batch.q.device)
    for b in range(batch.requests):
        first, end = int(batch.offsets[b]), int(batch.offsets[b + 1])
        for row in range(first, end):
            seen = int(batch.starts[b]) + (end if batch.sight == Sight.BLOCK else row + 1) - first
            k = _gather(batch.keys, batch.table[b], seen)[shared]
            v = _gather(batch.values, batch.table[b], seen)[shared]
            scores = torch.einsum("hd,htd->ht", batch.q[row].double(), k) * width**-0.5
            out[row] = torch.einsum("ht,htd->hd", torch.softmax(scores, dim=-1), v)
    return out


def _gather(pages: Tensor, table: Tensor, seen: int) -> Tensor:
    """The first ``seen`` positions of a request, float64 [Hkv, seen, hd]."""
    size = pages.shape[2]
    used = pages[table[: -(-seen // size)].long()]
    return used.transpose(0, 1).flatten(1, 2)[:, :seen].double()
