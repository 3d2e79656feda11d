"""The tokens that are still in the running, with their logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dspark_backend.errors import BackendError, GrammarError
from dspark_backend.sampling.mask import penalties, unpack

# Past this share of the vocabulary, a masked row is cheaper than a gathered one.
_GATHER_BELOW = 1 / 8


@dataclass(frozen=True, slots=True)
class Candidates:
    """A row of logits (``[N] float32``) over ``ids`` (``[N] uint32``, ascending), or over the whole
    vocabulary where ``ids`` is None. Ascending ids make "the first maximum" the lowest id."""

    logits: NDArray[np.float32]
    ids: NDArray[np.uint32] | None = None

    def token(self, index: int) -> int:
        """The token id at ``index`` of ``logits``."""
        return index if self.ids is None else int(self.ids[index])

    def token_ids(self) -> NDArray[np.uint32]:
        """``ids``, spelt out."""
        return np.arange(len(self.logits), dtype=np.uint32) if self.ids is None else self.ids

    def scaled(self, temperature: float) -> Candidates:
        """Logits over ``temperature``, which is positive."""
        return Candidates(self.logits / np.float32(temperature), self.ids)

    def at_least(self, cutoff: float) -> Candidates:
        """Those whose logit reaches ``cutoff``."""
        kept = np.flatnonzero(self.logits >= cutoff)
        if len(kept) == len(self.logits):
            return self
        ids = kept.astype(np.uint32) if self.ids is None else self.ids[kept]
        return Candidates(self.logits[kept], ids)

    def masked(self, mask: torch.Tensor) -> Candidates:
        """Those of the whole vocabulary that a grammar's ``mask`` (``[words] int32``) allows.

        Raises GrammarError where it allows none.
        """
        allowed = unpack(mask, len(self.logits))
        width = int(np.count_nonzero(allowed))
        if width == 0:
            raise GrammarError(
                "the grammar's mask allows no token: its matcher has ended or is in error, "
                "and must not be asked for another token"
            )
        if width <= _GATHER_BELOW * len(self.logits):
            ids = np.flatnonzero(allowed)
            return Candidates(self.logits[ids], ids.astype(np.uint32))
        logits = penalties(mask, len(self.logits))
        logits += self.logits
        return Candidates(logits)

    def argmax(self) -> int:
        """Index of the largest logit, the lowest id among equals.

        Raises BackendError where there is no usable maximum.
        """
        index = int(self.logits.argmax())  # numpy's argmax lands on a NaN if there is one
        peak = self.logits[index]
        if np.isfinite(peak):
            return index
        if peak == -np.inf:
            raise BackendError(
                "every token that may come next has logit -inf: the logit biases rule out all that "
                "the grammar and the model allow"
            )
        raise BackendError(
            f"the logit of token {self.token(index)} is {peak}: the forward pass went wrong "
            "(damaged weights, or an overflow)"
        )
