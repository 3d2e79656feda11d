"""Blocks whose slots a guide decides about on the host, with one wait for many slots.

The device goes through all slots of a block at once, each after the token that the guide is likely
to take before it: what is certain without logits (known tokens, what a grammar forces), the most
likely legal token of the first slot that is not, whose mask is known, and after that the most
likely token of all. The host asks the guide slot by slot, as long as it takes what was guessed: so
far the logits are those of its own chain. From the first other token on, the slots are guessed
anew. Every round decides a slot at least, so there is a wait for each surprise and never more than
one for each slot that is not certain; the chain is the same as with a wait for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspark_backend.drafter.chain import Chain
from dspark_backend.drafter.device_slots import DeviceSlots
from dspark_backend.kernels.upload import upload
from dspark_backend.speculation.protocol import Anchor, Proposal
from dspark_backend.speculation.vocabulary import DraftVocabulary

Guesses = tuple[Tensor, Tensor, Tensor] | tuple[()]
"""Empty, or of the N slots that guides are to decide about: logits float32 [N, D], c_k float64 [N],
and the tokens int64 [N] that the slots after them were computed for."""

_NO_LOGITS = np.empty(0, np.float32)


class GuidedBlocks:
    """The blocks of ``anchors``, each with a guide: ``hidden`` [F, g, d], ``base`` [F, g, D].

    :meth:`guess` launches, the caller copies, :meth:`decide` asks the guides, until nothing is left
    to guess.
    """

    def __init__(
        self,
        slots: DeviceSlots,
        vocabulary: DraftVocabulary,
        hidden: Tensor,
        base: Tensor,
        anchors: Sequence[Anchor],
    ) -> None:
        self._slots = slots
        self._vocabulary = vocabulary
        self._hidden, self._base = hidden, base
        self._chains = [Chain(anchor) for anchor in anchors]
        self._anchors = np.array([anchor.token for anchor in anchors], np.int64)
        shape = (len(anchors), hidden.shape[1])
        self._tokens = np.full(shape, -1, np.int64)  # -1: not decided
        self._sure = np.ones(shape)
        self._decided = [0] * len(anchors)
        # The recurrent state before each slot, and up to which slot a block's are right.
        self._states: list[Tensor | None] = [None] * (hidden.shape[1] + 1)
        self._reached = [0] * len(anchors)
        self._asked: list[tuple[int, int]] = []
        for i, anchor in enumerate(anchors):
            for k, token in enumerate(anchor.known):
                self._take(i, k, _NO_LOGITS, token, 1.0)

    def guess(self) -> Guesses:
        """Launch the slots that are not decided; empty where all are."""
        masks = {}
        for i, chain in enumerate(self._chains):
            mask = self._advance(i, chain)
            if mask is not None:
                masks[i] = mask
        size = self._tokens.shape[1]
        open_ = [i for i, chain in enumerate(self._chains) if not chain.ended]
        self._asked = [(k, i) for i in open_ for k in range(self._decided[i], size)]
        if not self._asked:
            return ()
        known = self._reached if self._slots.recurrent else self._decided
        first = min(known[i] for _, i in self._asked)
        count = len(self._chains)
        arrays: dict[str, NDArray[Any]] = {
            "anchors": self._anchors,
            "tokens": self._tokens,
            "asked": np.array([(k - first) * count + i for k, i in self._asked]),
        }
        if masks:
            arrays["words"] = np.stack([mask.numpy() for mask in masks.values()])
            arrays["word_rows"] = np.array(list(masks))
            arrays["masked_at"] = np.full(count, -1)
            arrays["masked_at"][list(masks)] = [self._decided[i] for i in masks]
        return self._launch(upload(arrays, self._base.device), first)

    def decide(
        self,
        logits: NDArray[np.float32],
        confidence: NDArray[np.float64],
        guessed: NDArray[np.int64],
    ) -> None:
        """Ask the guides about the guesses that came back, each as far as it goes along."""
        surprised: set[int] = set()
        for row, (k, i) in enumerate(self._asked):
            chain = self._chains[i]
            if i in surprised or chain.ended:
                continue
            guess = int(guessed[row])
            token = self._take(i, k, logits[row], guess, float(confidence[row]))
            if token != guess:
                surprised.add(i)
        self._reached = [*self._decided]

    def proposals(self) -> list[Proposal]:
        """All blocks, once there is nothing left to guess."""
        survival = np.cumprod(self._sure, axis=1)
        return [
            chain.proposal(self._tokens[i], survival[i]) for i, chain in enumerate(self._chains)
        ]

    def _advance(self, i: int, chain: Chain) -> Tensor | None:
        """Take what is certain; the mask of the slot after it, where one is known."""
        foresight = chain.foresee(self._tokens.shape[1] - self._decided[i])
        for token in foresight.tokens:
            self._take(i, self._decided[i], _NO_LOGITS, token, 1.0)
        if foresight.ended:
            chain.end()
        return foresight.mask

    def _take(
        self, i: int, k: int, logits: NDArray[np.float32], likeliest: int, confidence: float
    ) -> int:
        token, sure = self._chains[i].take(k, logits, likeliest, confidence, self._vocabulary)
        if not self._chains[i].ended:
            self._tokens[i, k], self._sure[i, k] = token, sure
            self._decided[i] = k + 1
        return token

    def _launch(self, there: dict[str, Tensor], first: int) -> Guesses:
        given, size = there["tokens"], self._tokens.shape[1]
        token = there["anchors"] if first == 0 else given[:, first - 1].clamp(min=0)
        illegal = self._illegal(there)
        logits, sure, tokens = [], [], []
        for k in range(first, size):
            hidden = self._hidden[:, k]
            row, previous, state = self._slots.after(
                hidden, self._base[:, k], token, self._states[k]
            )
            self._states[k + 1] = state
            logits.append(row)
            sure.append(self._slots.confidence(hidden, previous, k))
            if illegal is not None:
                row = row.masked_fill(illegal & (there["masked_at"] == k)[:, None], -torch.inf)
            guess = self._slots.ids[row.argmax(1)]
            token = torch.where(given[:, k] >= 0, given[:, k], guess)
            tokens.append(token)
        asked = there["asked"]
        return torch.cat(logits)[asked], torch.cat(sure)[asked], torch.cat(tokens)[asked]

    def _illegal(self, there: dict[str, Tensor]) -> Tensor | None:
        """Bool [F, D]: what the mask of a block's next slot rules out."""
        if "words" not in there:
            return None
        ids = self._slots.ids
        bits = there["words"][:, ids >> 5] >> (ids & 31) & 1
        illegal = torch.zeros(len(self._chains), len(ids), dtype=torch.bool, device=ids.device)
        illegal[there["word_rows"]] = bits == 0
        return illegal
