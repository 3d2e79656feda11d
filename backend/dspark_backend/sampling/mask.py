"""Grammar bitmasks: one bit a token, packed into little-endian int32 words, 1 = allowed."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray


def unpack(mask: torch.Tensor, vocab: int) -> NDArray[np.bool_]:
    """``[words] int32`` to ``[vocab] bool``."""
    return np.unpackbits(_octets(mask, vocab), bitorder="little", count=vocab).view(np.bool_)


def penalties(mask: torch.Tensor, vocab: int) -> NDArray[np.float32]:
    """``[words] int32`` to ``[vocab] float32``: 0 where a token is allowed, -inf where it is not.

    A table lookup per eight tokens: selecting by a wide, irregular bool row costs ten times more.
    """
    return np.take(_octet_penalties(), _octets(mask, vocab), axis=0).reshape(-1)[:vocab]


def _octets(mask: torch.Tensor, vocab: int) -> NDArray[np.uint8]:
    """The mask's bytes in the order of their tokens, at least ``vocab / 8`` of them.

    A mask is as long as the tokenizer's table. Logits may be longer (padded embeddings: those ids
    are illegal) or shorter (the surplus bits are no tokens).
    """
    words = np.ascontiguousarray(mask.numpy(force=True), dtype="<i4")
    missing = (vocab + 31) // 32 - len(words)
    if missing > 0:
        words = np.pad(words, (0, missing))
    return words.view(np.uint8)


@cache
def _octet_penalties() -> NDArray[np.float32]:
    octets = np.arange(256, dtype=np.uint8)[:, None]
    allowed = np.unpackbits(octets, axis=1, bitorder="little").view(np.bool_)
    return np.where(allowed, np.float32(0.0), np.float32(-np.inf))
