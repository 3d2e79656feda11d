"""Sampled drafts, for rejection sampling: from q', by the step's own processors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dspark_backend.sampling.sampler import Sampler
from dspark_backend.speculation.distribution import Distribution
from dspark_backend.speculation.guide import Allowed
from dspark_backend.speculation.vocabulary import DraftVocabulary


class SampledDrafts:
    """The choice of a :class:`ChainGuide` whose drafts are samples.

    ``anchor`` is the block's anchor position and ``first_slot`` the slot of its first draft: they
    key the noise (``Stream.DRAFT``), so a block's draws are its own.
    """

    def __init__(self, sampler: Sampler, anchor: int, first_slot: int) -> None:
        self._sampler = sampler
        self._anchor = anchor
        self._first_slot = first_slot

    def pick(
        self,
        logits: NDArray[np.float32],
        vocabulary: DraftVocabulary,
        allowed: Allowed | None,
        path: Sequence[int],
    ) -> tuple[int, Distribution | None] | None:
        """A draw from q', and q'; None where processors rule out all that the drafter can say."""
        return self._sampler.draft(
            vocabulary.spread(logits, self._sampler.vocab_size),
            None if allowed is None else allowed.mask,
            path,
            anchor=self._anchor,
            slot=self._first_slot + len(path),
        )
