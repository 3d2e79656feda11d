"""The sequential stage on the CPU (DSPARK.md, section 1): slots left to right, each seeing the
token before it, whoever decided about that one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from dspark_backend.drafter.calibration import Calibration
from dspark_backend.drafter.chain import SOURCE, Chain
from dspark_backend.drafter.config import DrafterConfig, HeadType
from dspark_backend.drafter.weights import DraftWeights, SequentialWeights
from dspark_backend.speculation.protocol import Anchor, Proposal
from dspark_backend.speculation.vocabulary import DraftVocabulary

Rows = NDArray[np.float32]


class SequentialStage:
    """Hidden states in, proposals out, with calibrated confidences."""

    def __init__(
        self,
        weights: DraftWeights,
        config: DrafterConfig,
        vocabulary: DraftVocabulary,
        calibration: Calibration,
    ) -> None:
        self._weights = weights
        self._config = config
        self._vocabulary = vocabulary
        self._calibration = calibration

    def run(self, hidden: Rows, anchors: Sequence[Anchor]) -> list[Proposal]:
        """``hidden`` [S, g, d]: the block of each anchor."""
        sessions, size, width = hidden.shape
        weights = self._weights
        logits = np.empty((sessions * size, weights.head.channels), np.float32)
        weights.head(hidden.reshape(sessions * size, width), logits)
        base = logits.reshape(sessions, size, -1)
        head = (
            None
            if weights.sequential is None
            else _MarkovHead(weights.sequential, self._config.head)
        )
        chains = {i: Chain(a) for i, a in enumerate(anchors) if a.known or a.guide is not None}
        drafts = np.empty((sessions, size), np.int64)
        sure = np.ones((sessions, size))
        token = np.array([anchor.token for anchor in anchors])
        for k in range(size):
            row = base[:, k]
            previous: Rows | None = None
            if head is not None:
                previous = head.embed(token)
                row = row + head.bias(hidden[:, k], previous)
            sure[:, k] = self._confidence(hidden[:, k], previous, k)
            token = self._vocabulary.ids[row.argmax(axis=1)]
            for i, chain in chains.items():
                token[i], sure[i, k] = chain.take(
                    k, row[i], int(token[i]), float(sure[i, k]), self._vocabulary
                )
            drafts[:, k] = token
        survival = np.cumprod(sure, axis=1)
        return [
            chains[i].proposal(drafts[i], survival[i])
            if i in chains
            else Proposal(tuple(drafts[i].tolist()), tuple(survival[i].tolist()), SOURCE)
            for i in range(sessions)
        ]

    def _confidence(self, hidden: Rows, previous: Rows | None, slot: int) -> NDArray[np.float64]:
        """Calibrated c_k [S]; 1 where the drafter has no such head: it never says to stop."""
        weights = self._weights
        if weights.confidence is None:
            return np.ones(len(hidden))
        x = hidden
        if self._config.confidence_with_markov and previous is not None:
            x = np.concatenate([hidden, previous], axis=1)
        # Row by row in float64: a matrix product could change bits with the number of rows.
        logits = np.array([float((row.astype(np.float64) * weights.confidence).sum()) for row in x])
        return self._calibration.confidence(slot, logits + weights.confidence_bias)


class _MarkovHead:
    """A Markov head on its way through one block of each session."""

    def __init__(self, weights: SequentialWeights, kind: HeadType) -> None:
        self._weights = weights
        self._kind = kind
        self._state: Rows | None = None

    def embed(self, tokens: NDArray[np.int64]) -> Rows:
        """W1 of the tokens before: float32 [S, r]."""
        rows: Rows = self._weights.w1[torch.from_numpy(tokens)].float().numpy()
        return rows

    def bias(self, hidden: Rows, previous: Rows) -> Rows:
        """The bias of a slot's logits, float32 [S, D]; moves the state on."""
        latent = np.ascontiguousarray(self._latent(hidden, previous))
        out = np.empty((len(latent), self._weights.w2.channels), np.float32)
        self._weights.w2(latent, out)
        return out

    def _latent(self, hidden: Rows, previous: Rows) -> Rows:
        inner = self._weights.inner
        if inner is None:
            return previous
        joint = np.empty((len(hidden), inner.channels), np.float32)
        if self._kind is HeadType.GATED:
            inner(np.concatenate([hidden, previous], axis=1), joint)
            return _sigmoid(joint) * previous
        if self._state is None:
            self._state = np.zeros_like(previous)
        inner(np.concatenate([self._state, previous, hidden], axis=1), joint)
        gate, candidate, output = np.split(joint, 3, axis=1)
        kept = _sigmoid(gate)
        self._state = kept * self._state + (1 - kept) * np.tanh(candidate)
        return np.tanh(output)


def _sigmoid(x: Rows) -> Rows:
    out: Rows = np.float32(0.5) * (1 + np.tanh(np.float32(0.5) * x))
    return out
