"""The sequential stage on the device (DSPARK.md, section 1): slots left to right, each seeing the
token before it.

Blocks that nobody guides are chained on the device and copied back together: by
``kernels/markov`` where the head is vanilla and the whole block is drafted, else slot by slot in
torch. A guide decides on the host, about slots that were guessed (``device_guided.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspark_backend.drafter.calibration import Calibration
from dspark_backend.drafter.chain import SOURCE
from dspark_backend.drafter.config import DrafterConfig, HeadType
from dspark_backend.drafter.device_guided import GuidedBlocks
from dspark_backend.drafter.device_slots import DeviceSlots
from dspark_backend.drafter.device_weights import DeviceDraftWeights
from dspark_backend.kernels.download import download
from dspark_backend.kernels.markov.contract import Blocks, Head
from dspark_backend.kernels.markov.triton import draft
from dspark_backend.kernels.upload import upload
from dspark_backend.speculation.protocol import Anchor, Proposal
from dspark_backend.speculation.vocabulary import DraftVocabulary


class DeviceSequentialStage:
    """Hidden states in, proposals out, with calibrated confidences."""

    def __init__(
        self, weights: DeviceDraftWeights, config: DrafterConfig, calibration: Calibration
    ) -> None:
        self._weights = weights
        self._slots = DeviceSlots(weights, config, calibration)
        self._vocabulary = DraftVocabulary(weights.ids.cpu().numpy())
        self._head: Head | None = None
        if weights.sequential is not None and config.head is HeadType.VANILLA:
            whole = config.draft_vocab_size is None
            ids = None if whole else weights.ids.int()
            self._head = Head(weights.sequential.w1, weights.sequential.w2.weight, ids)

    def run(self, hidden: Tensor, anchors: Sequence[Anchor]) -> list[Proposal]:
        """``hidden`` [S, g, d] of the weights' dtype: the block of each anchor."""
        sessions, size, _ = hidden.shape
        base = self._weights.head(hidden.flatten(0, 1)).view(sessions, size, -1)
        guided = [i for i, anchor in enumerate(anchors) if anchor.guide is not None]
        alone = [i for i, anchor in enumerate(anchors) if anchor.guide is None]
        known = [i for i in alone if anchors[i].known or self._head is None]
        free = [i for i in alone if i not in known]
        chained = []
        if free:
            chained.append(self._drafted(hidden, base, free, anchors))
        if known:
            chained.append(self._chained(hidden, base, known, anchors))
        decided = self._guided(hidden, base, guided, anchors) if guided else None
        guesses = () if decided is None else decided.guess()
        # The one wait, unless a guide does not take what was guessed for it.
        answers = download([*chained, *guesses])
        rows = chain.from_iterable(answers[: len(chained)])
        proposals = {
            i: _proposal(row[:size], row[size:], len(anchors[i].known))
            for i, row in zip((*free, *known), rows, strict=True)
        }
        if decided is not None:
            while guesses:
                decided.decide(*answers[-len(guesses) :])
                guesses = decided.guess()
                answers = download(guesses)
            proposals.update(zip(guided, decided.proposals(), strict=True))
        return [proposals[i] for i in range(sessions)]

    def _guided(
        self, hidden: Tensor, base: Tensor, which: Sequence[int], anchors: Sequence[Anchor]
    ) -> GuidedBlocks:
        rows = upload({"which": np.array(which)}, base.device)["which"]
        own = [anchors[i] for i in which]
        return GuidedBlocks(self._slots, self._vocabulary, hidden[rows], base[rows], own)

    def _drafted(
        self, hidden: Tensor, base: Tensor, which: Sequence[int], anchors: Sequence[Anchor]
    ) -> Tensor:
        """Tokens and survivals float64 [F, 2 g] of whole blocks, by the kernel."""
        assert self._head is not None
        first = np.array([anchors[i].token for i in which], np.int32)
        there = upload({"first": first, "which": np.array(which)}, base.device)
        own = base[there["which"]].contiguous()
        tokens = draft(Blocks(own, there["first"], self._head))
        # A slot without a token (-1) ends the block: what the next ones read does not matter.
        before = torch.cat([there["first"][:, None], tokens[:, :-1]], dim=1).clamp(min=0)
        previous = self._head.w1[before.long()]
        sure = self._slots.confidence(hidden[there["which"]], previous, slice(None))
        return torch.cat([tokens.double(), sure.cumprod(dim=1)], dim=1)

    def _chained(
        self, hidden: Tensor, base: Tensor, which: Sequence[int], anchors: Sequence[Anchor]
    ) -> Tensor:
        """As :meth:`_drafted`, slot by slot: for any head, and for blocks that begin with known
        tokens."""
        size = hidden.shape[1]
        given = np.full((len(which), size), -1)
        for place, i in enumerate(which):
            given[place, : len(anchors[i].known)] = anchors[i].known
        first = np.array([anchors[i].token for i in which])
        there = upload({"first": first, "given": given, "which": np.array(which)}, base.device)
        hidden, base, token = hidden[there["which"]], base[there["which"]], there["first"]
        state: Tensor | None = None
        tokens, sure = [], []
        for k in range(size):
            row, previous, state = self._slots.after(hidden[:, k], base[:, k], token, state)
            confidence = self._slots.confidence(hidden[:, k], previous, k)
            is_given = there["given"][:, k] >= 0
            token = torch.where(is_given, there["given"][:, k], self._weights.ids[row.argmax(1)])
            tokens.append(token)
            sure.append(torch.where(is_given, 1.0, confidence))
        survival = torch.stack(sure, dim=1).cumprod(dim=1)
        return torch.cat([torch.stack(tokens, dim=1).double(), survival], dim=1)


def _proposal(tokens: NDArray[np.float64], survival: NDArray[np.float64], first: int) -> Proposal:
    """Of a block of which the first ``first`` slots were known; -1 ends it."""
    ended = np.flatnonzero(tokens < 0)
    last = int(ended[0]) if len(ended) else len(tokens)
    drafts = tokens[first:last].astype(np.int64).tolist()
    return Proposal(tuple(drafts), tuple(survival[first:last].tolist()), SOURCE)
