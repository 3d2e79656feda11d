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

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dspark_backend.drafter.chain import Chain
from dspark_backend.drafter.device_guessing import Guessed, guessed
from dspark_backend.drafter.device_slots import DeviceSlots
from dspark_backend.kernels.recording import Piece, Recordings
from dspark_backend.kernels.upload import upload
from dspark_backend.speculation.protocol import Anchor, Proposal
from dspark_backend.speculation.vocabulary import DraftVocabulary

Guesses = Guessed | tuple[()]
"""Empty where nothing is left to guess."""

_MOST = 2**24
"""Bytes of logits that a recording leaves for the host, and holds: what leaves more is launched."""

_NO_LOGITS = np.empty(0, np.float32)


class GuidedBlocks:
    """The blocks of ``anchors``, each with a guide: ``hidden`` [F, g, d], ``base`` [F, g, D], of
    which blocks behind theirs are nobody's.

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
        recordings: Recordings | None = None,
    ) -> None:
        """With ``recordings``, guesses are replayed, unless they are many."""
        self._slots = slots
        self._vocabulary = vocabulary
        self._hidden, self._base = hidden, base
        self._recordings = recordings
        self._chains = [Chain(anchor) for anchor in anchors]
        self._anchors = np.zeros(len(hidden), np.int64)
        self._anchors[: len(anchors)] = [anchor.token for anchor in anchors]
        shape = hidden.shape[:2]
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
        asked = 1 << (len(self._asked) - 1).bit_length()
        if self._recordings is not None and 4 * asked * len(self._slots.ids) <= _MOST:
            # All slots: else there would be a recording for each of them to begin with.
            return self._replayed(self._recordings, self._arrays(masks, 0), asked)
        known = self._reached if self._slots.recurrent else self._decided
        first = min(known[i] for _, i in self._asked)
        return self._launched(self._arrays(masks, first), first)

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

    def _arrays(self, masks: Mapping[int, Tensor], first: int) -> dict[str, NDArray[Any]]:
        """What :func:`guessed` reads from slot ``first`` on, with the ``masks`` that are known."""
        count = len(self._hidden)
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
        return arrays

    def _launched(self, arrays: dict[str, NDArray[Any]], first: int) -> Guesses:
        def run(there: Mapping[str, Tensor]) -> Guessed:
            return guessed(self._slots, there, first, self._states)

        if self._recordings is not None:
            logits, confidence, tokens = self._recordings.launch(run, arrays, self._pieces())
            return logits, confidence, tokens
        there = upload(arrays, self._base.device)
        return run(there | {"hidden": self._hidden, "base": self._base})

    def _pieces(self) -> dict[str, Piece]:
        count = len(self._hidden)
        return {"hidden": Piece(self._hidden, count), "base": Piece(self._base, count)}

    def _replayed(
        self, recordings: Recordings, arrays: dict[str, NDArray[Any]], size: int
    ) -> Guesses:
        """As :func:`guessed`, ``size`` slots asked for and a mask for each block: the last of them
        once more in place of those there are not, the same bits in the same place."""
        count, asked = len(self._hidden), len(self._asked)
        sizes = {"asked": size, "words": count, "word_rows": count}
        for name in sizes.keys() & arrays.keys():
            more = sizes[name] - len(arrays[name])
            widths = [(0, more)] + [(0, 0)] * (arrays[name].ndim - 1)
            arrays[name] = np.pad(arrays[name], widths, mode="edge")
        slots = self._slots  # and nothing else of this block: a recording outlives it
        logits, confidence, tokens = recordings.run(
            ("guess", id(slots)),
            lambda there: guessed(slots, there),
            arrays,
            self._pieces(),
            slots,
        )
        return logits[:asked], confidence[:asked], tokens[:asked]
