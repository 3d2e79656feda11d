"""The chain of an anchor whose slots the host decides about: known tokens, then its guide."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dspark_backend.speculation.guide import Foresight, Slot
from dspark_backend.speculation.protocol import Anchor, Proposal
from dspark_backend.speculation.vocabulary import DraftVocabulary

SOURCE = "dspark"


class Chain:
    """The slots of an anchor with known tokens or a guide."""

    def __init__(self, anchor: Anchor) -> None:
        self._known = anchor.known
        self._guide = anchor.guide
        self._slots: list[Slot] = []
        self._ended = False

    @property
    def ended(self) -> bool:
        """Whether the guide ended the block: its next slots hold nothing."""
        return self._ended

    def foresee(self, most: int) -> Foresight:
        """As :meth:`Guide.foresee`, of the slots after those that were taken, known ones among
        them."""
        if self._guide is None or self._ended:
            return Foresight(ended=self._ended)
        return self._guide.foresee(most)

    def end(self) -> None:
        """Nothing is asked of the guide any more: the block ends here."""
        self._ended = True

    def take(
        self,
        k: int,
        logits: NDArray[np.float32],
        likeliest: int,
        confidence: float,
        vocabulary: DraftVocabulary,
    ) -> tuple[int, float]:
        """What slot k holds, and c_k."""
        if k < len(self._known):
            return self._known[k], 1.0
        if self._guide is None or self._ended:
            return likeliest, confidence
        slot = self._guide.choose(logits, vocabulary)
        if slot is None:
            self._ended = True
            return likeliest, confidence
        self._slots.append(slot)
        return slot.token, slot.confidence(confidence)

    def proposal(self, drafts: NDArray[np.int64], survival: NDArray[np.float64]) -> Proposal:
        """``drafts`` and ``survival`` [g] of the whole block."""
        first, slots = len(self._known), self._slots
        last = len(drafts) if self._guide is None else first + len(slots)
        drawn = tuple(slot.distribution for slot in slots)
        return Proposal(
            tuple(drafts[first:last].tolist()),
            tuple(survival[first:last].tolist()),
            SOURCE,
            mask_width=tuple(slot.mask_width for slot in slots),
            forced=tuple(slot.forced for slot in slots),
            distributions=drawn if any(q is not None for q in drawn) else (),
        )
