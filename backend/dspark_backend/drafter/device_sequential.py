"""The sequential stage on the device (DSPARK.md, section 1): slots left to right, each seeing the
token before it.

Blocks that nobody guides are chained on the device and copied back together: by
``kernels/markov`` where the head is vanilla and the whole block is drafted, else slot by slot in
torch. A guide decides on the host: each of its slots costs a copy back.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspark_backend.drafter.calibration import Calibration
from dspark_backend.drafter.chain import SOURCE, Chain
from dspark_backend.drafter.config import DrafterConfig, HeadType
from dspark_backend.drafter.device_weights import DeviceDraftWeights
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
        self._config = config
        self._vocabulary = DraftVocabulary(weights.ids.cpu().numpy())
        offsets = calibration.offsets or (0.0,) * config.block_size
        scale = np.array([calibration.temperatures, offsets])
        self._temperatures, self._offsets = torch.from_numpy(scale).to(weights.ids.device)
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
        proposals: dict[int, Proposal] = {}
        chained = []
        if free:
            chained.append(self._drafted(hidden, base, free, anchors))
        if known:
            chained.append(self._chained(hidden, base, known, anchors))
        if chained:
            both = torch.cat(chained).cpu().numpy()  # the one copy back
            for i, row in zip((*free, *known), both, strict=True):
                proposals[i] = _proposal(row[:size], row[size:], len(anchors[i].known))
        if guided:
            made = self._guided(hidden[guided], base[guided], [anchors[i] for i in guided])
            proposals.update(zip(guided, made, strict=True))
        return [proposals[i] for i in range(sessions)]

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
        sure = self._confidence(hidden[there["which"]], previous, slice(None))
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
            row, previous, state = self._slot(hidden[:, k], base[:, k], token, state)
            confidence = self._confidence(hidden[:, k], previous, k)
            is_given = there["given"][:, k] >= 0
            token = torch.where(is_given, there["given"][:, k], self._weights.ids[row.argmax(1)])
            tokens.append(token)
            sure.append(torch.where(is_given, 1.0, confidence))
        survival = torch.stack(sure, dim=1).cumprod(dim=1)
        return torch.cat([torch.stack(tokens, dim=1).double(), survival], dim=1)

    def _guided(self, hidden: Tensor, base: Tensor, anchors: Sequence[Anchor]) -> list[Proposal]:
        size = hidden.shape[1]
        chains = [Chain(anchor) for anchor in anchors]
        tokens = np.array([anchor.token for anchor in anchors])
        state: Tensor | None = None
        drafts, sure = np.empty((len(anchors), size), np.int64), np.ones((len(anchors), size))
        for k in range(size):
            token = torch.from_numpy(tokens).to(base.device)
            row, previous, state = self._slot(hidden[:, k], base[:, k], token, state)
            confidence = self._confidence(hidden[:, k], previous, k)
            there = torch.cat([row.double(), confidence[:, None]], dim=1).cpu().numpy()
            tokens = np.empty_like(tokens)
            for i, chain in enumerate(chains):
                logits = there[i, :-1].astype(np.float32)
                likeliest = int(self._vocabulary.ids[logits.argmax()])
                tokens[i], sure[i, k] = chain.take(
                    k, logits, likeliest, float(there[i, -1]), self._vocabulary
                )
            drafts[:, k] = tokens
        survival = np.cumprod(sure, axis=1)
        return [chain.proposal(drafts[i], survival[i]) for i, chain in enumerate(chains)]

    def _slot(
        self, hidden: Tensor, base: Tensor, token: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Logits float32 [F, D] of a slot after ``token`` [F], W1 of that, and the state."""
        weights, row = self._weights.sequential, base.float()
        if weights is None:
            return row, None, None
        previous = weights.w1[token]
        latent, state = self._latent(hidden, previous, state)
        return row + weights.w2(latent).float(), previous, state

    def _latent(
        self, hidden: Tensor, previous: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        weights = self._weights.sequential
        if weights is None or weights.inner is None:
            return previous, None
        if self._config.head is HeadType.GATED:
            gate = weights.inner(torch.cat([hidden, previous], dim=1)).float().sigmoid()
            return (gate * previous.float()).to(previous.dtype), None
        before = torch.zeros_like(previous).float() if state is None else state
        joint = weights.inner(torch.cat([before.to(previous.dtype), previous, hidden], dim=1))
        gate, candidate, output = joint.float().chunk(3, dim=1)
        kept = gate.sigmoid()
        return output.tanh().to(previous.dtype), kept * before + (1 - kept) * candidate.tanh()

    def _confidence(self, hidden: Tensor, previous: Tensor | None, slots: int | slice) -> Tensor:
        """Calibrated c_k float64 [...], ``hidden`` being [..., d] of ``slots``; 1 where the drafter
        has no such head: it never says to stop."""
        vector = self._weights.confidence
        if vector is None:
            return hidden.new_ones(hidden.shape[:-1], dtype=torch.float64)
        x = hidden
        if self._config.confidence_with_markov and previous is not None:
            x = torch.cat([hidden, previous], dim=-1)
        logits = (x.double() * vector).sum(dim=-1) + self._weights.confidence_bias
        scaled: Tensor = logits / self._temperatures[slots] + self._offsets[slots]
        return scaled.sigmoid()


def _proposal(tokens: NDArray[np.float64], survival: NDArray[np.float64], first: int) -> Proposal:
    """Of a block of which the first ``first`` slots were known; -1 ends it."""
    ended = np.flatnonzero(tokens < 0)
    last = int(ended[0]) if len(ended) else len(tokens)
    drafts = tokens[first:last].astype(np.int64).tolist()
    return Proposal(tuple(drafts), tuple(survival[first:last].tolist()), SOURCE)
