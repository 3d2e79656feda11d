"""From the target's logits to p', the distribution that a step samples from."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from dspark_backend.request import SamplingParams
from dspark_backend.sampling.candidates import Candidates
from dspark_backend.sampling.counts import TokenCounts
from dspark_backend.sampling.truncation import min_p_cutoff, top_k_cutoff, top_p_cutoff


class Processors:
    """A step's logits processors, in their order: bias, penalties, grammar mask, temperature,
    top-k, top-p, min-p. Each sees what the ones before it left over.

    The order and the definitions are those of transformers' ``generate``; presence and frequency
    penalties, which it lacks, are subtracted after the repetition penalty. ``counts`` is None
    where no penalty needs it.
    """

    def __init__(self, params: SamplingParams, counts: TokenCounts | None) -> None:
        self._params = params
        self._counts = counts
        self._bias_ids = np.array(list(params.logit_bias), dtype=np.int64)
        self._bias = np.array(list(params.logit_bias.values()), dtype=np.float32)

    @property
    def rewrites_logits(self) -> bool:
        """Whether single tokens are moved up or down (bias or penalties)."""
        return self._counts is not None or len(self._bias_ids) > 0

    def scored(self, logits: NDArray[np.float32], mask: torch.Tensor | None) -> Candidates:
        """The legal tokens after bias and penalties: what greedy decoding takes the maximum of.

        ``logits`` is ``[V]`` and is not written to; ``mask`` is ``[words] int32``.
        """
        candidates = Candidates(self._rewritten(logits) if self.rewrites_logits else logits)
        return candidates if mask is None else candidates.masked(mask)

    def sampled(self, logits: NDArray[np.float32], mask: torch.Tensor | None) -> Candidates:
        """The support of p' with logits over temperature; p' is their softmax."""
        return self.truncated(self.scored(logits, mask))

    def truncated(self, scored: Candidates) -> Candidates:
        """The second half of :meth:`sampled`: temperature and truncation of ``scored`` ones."""
        params = self._params
        kept = scored.scaled(params.temperature)
        kept.argmax()  # so that the searches below meet no NaN
        if params.top_k > 0:
            kept = kept.at_least(top_k_cutoff(kept.logits, params.top_k))
        if params.top_p < 1.0:
            kept = kept.at_least(top_p_cutoff(kept.logits, params.top_p))
        if params.min_p > 0.0:
            kept = kept.at_least(min_p_cutoff(kept.logits, params.min_p))
        return kept

    def _rewritten(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        logits = logits.copy()
        logits[self._bias_ids] += self._bias
        if self._counts is not None:
            self._penalise(logits, self._counts)
        return logits

    def _penalise(self, logits: NDArray[np.float32], seen: TokenCounts) -> None:
        params, ids, counts = self._params, seen.ids, seen.counts
        values = logits[ids]
        repetition = np.float32(params.repetition_penalty)
        values = np.where(values < 0, values * repetition, values / repetition)
        values -= np.float32(params.frequency_penalty) * counts
        values -= np.float32(params.presence_penalty) * (counts > 0)
        logits[ids] = values
