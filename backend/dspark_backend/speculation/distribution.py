"""What a draft was drawn from: q', kept exactly as it was drawn from (DSPARK.md, section 6)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Distribution:
    """``probabilities`` ([N] float64, summing to 1) of the token ``ids`` ([N] uint32, ascending);
    every other token has none. A deterministic draft has no such object: its q' is one-hot."""

    ids: NDArray[np.uint32]
    probabilities: NDArray[np.float64]

    def of(self, token: int) -> float:
        """q'(token)."""
        at = int(np.searchsorted(self.ids, token))
        if at == len(self.ids) or int(self.ids[at]) != token:
            return 0.0
        return float(self.probabilities[at])

    def dense(self, vocab_size: int) -> NDArray[np.float64]:
        """q' over the whole vocabulary, [vocab_size] float64."""
        row = np.zeros(vocab_size)
        row[self.ids] = self.probabilities
        return row
