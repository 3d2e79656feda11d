"""The sequential stage slot by slot in torch float64: the oracle of ``triton.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from dspark_backend.kernels.markov.contract import Blocks


def draft(blocks: Blocks) -> Tensor:
    """What :func:`dspark_backend.kernels.markov.triton.draft` computes: int32 [B, g]."""
    requests, size, _ = blocks.base.shape
    tokens = torch.full((requests, size), -1, dtype=torch.int32, device=blocks.base.device)
    for b in range(requests):
        previous = int(blocks.anchors[b])
        for k in range(size):
            row = logits(blocks, b, k, previous)
            if not -torch.inf < float(row.max()) < torch.inf:  # NaN, too, is no maximum
                break
            choice = int((row == row.max()).nonzero()[0])
            ids = blocks.head.ids
            previous = choice if ids is None else int(ids[choice])
            tokens[b, k] = previous
    return tokens


def logits(blocks: Blocks, b: int, k: int, previous: int) -> Tensor:
    """U_k + W2 . W1[x_{k-1}] (DSPARK.md, section 1), -inf where the slot's mask forbids: float64
    [D]."""
    head = blocks.head
    row = blocks.base[b, k].double() + head.w2.double() @ head.w1[previous].double()
    masks = blocks.masks
    mask_row = -1 if masks is None else int(masks.of_row[b * blocks.base.shape[1] + k])
    if masks is not None and mask_row >= 0:
        words = masks.words[mask_row]
        ids = torch.arange(len(row), device=row.device) if head.ids is None else head.ids.long()
        inside = ids < 32 * len(words)
        bits = words[torch.where(inside, ids, 0) >> 5] >> (ids & 31) & 1
        row = row.masked_fill(~inside | (bits == 0), -torch.inf)
    return row
