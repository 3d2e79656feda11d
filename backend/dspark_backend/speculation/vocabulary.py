"""The tokens that a drafter can say, and which of them a grammar allows."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray


class DraftVocabulary:
    """Draft ids 0 .. D - 1 and the target ids that they stand for.

    ``ids`` ([D] int64, ascending) are a drafter's ``d2t``; :meth:`whole` is the vocabulary of one
    without.
    """

    def __init__(self, ids: NDArray[np.int64]) -> None:
        self.ids = ids
        # Where each token's bit lies in a mask: a mask is read at D places, not spread over V.
        self._word = ids >> 5
        self._bit = (ids & 31).astype(np.int32)

    @classmethod
    def whole(cls, size: int) -> DraftVocabulary:
        return cls(np.arange(size))

    def __len__(self) -> int:
        return len(self.ids)

    def legal(self, mask: torch.Tensor) -> NDArray[np.intp]:
        """The draft ids, ascending, that ``mask`` ([words] int32) allows."""
        words: NDArray[np.int32] = mask.numpy()
        # Shifting an int32 keeps its sign, and the lowest bit is the one that was asked for.
        return np.flatnonzero((words[self._word] >> self._bit) & 1)

    def spread(self, logits: NDArray[np.float32], vocab_size: int) -> NDArray[np.float32]:
        """Draft ``logits`` [D] as a row of the target's vocabulary, float32 [vocab_size]: -inf for
        what the drafter cannot say."""
        row = np.full(vocab_size, -np.inf, np.float32)
        row[self.ids] = logits
        return row
