"""Grammar bitmasks: one bit a token, packed into little-endian int32 words, 1 = allowed."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray


def is_allowed(mask: torch.Tensor, token: int) -> bool:
    """Whether ``mask`` (``[words] int32``) allows ``token``. Ids past its last word are illegal."""
    word = token >> 5
    return word < mask.shape[0] and bool((int(mask[word]) >> (token & 31)) & 1)


def unpack(mask: torch.Tensor, vocab: int) -> NDArray[np.bool_]:
    """``[words] int32`` to ``[vocab] bool``.

    A mask is as long as the tokenizer's table. Logits may be longer (padded embeddings: those ids
    are illegal) or shorter (the surplus bits are no tokens).
    """
    octets = np.ascontiguousarray(mask.numpy(force=True).astype("<i4", copy=False)).view(np.uint8)
    bits = np.unpackbits(octets, bitorder="little", count=vocab)
    return bits.view(np.bool_)
