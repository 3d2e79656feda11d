"""A matcher's bitmask, one bit a token: ``[words] int32``, lowest bit first, 1 = legal.

What can be read off a mask without spreading it over the vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch


def is_allowed(mask: torch.Tensor, token: int) -> bool:
    """Whether ``mask`` allows ``token``. Ids past its last word are illegal."""
    word = token >> 5
    return word < mask.shape[0] and bool((int(mask[word]) >> (token & 31)) & 1)


def width(mask: torch.Tensor) -> int:
    """How many tokens ``mask`` allows."""
    return int.from_bytes(mask.numpy().tobytes(), "little").bit_count()


def sole(mask: torch.Tensor) -> int:
    """The token of a ``mask`` of width 1 (of a wider one the lowest). Raises IndexError when none
    is allowed."""
    words = mask.numpy().view(np.uint32)
    word = int(np.flatnonzero(words)[0])
    bits = int(words[word])
    return 32 * word + (bits & -bits).bit_length() - 1


def only(token: int, words: int) -> torch.Tensor:
    """The mask of ``words`` words that allows ``token`` alone."""
    mask = np.zeros(words, np.uint32)
    mask[token >> 5] = 1 << (token & 31)
    return torch.from_numpy(mask.view(np.int32))
