"""What the engine holds per running step: its parameters, its noise and what it has written."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from dspark_backend.request import SamplingParams
from dspark_backend.sampling.candidates import Candidates
from dspark_backend.sampling.choose import coupled_choice, greedy_choice
from dspark_backend.sampling.counts import TokenCounts
from dspark_backend.sampling.mask import is_allowed
from dspark_backend.sampling.noise import Noise, Stream
from dspark_backend.sampling.params import validate
from dspark_backend.sampling.processors import Processors
from dspark_backend.sampling.verify import Acceptance


class Sampler:
    """Chooses the tokens of one step.

    Greedy at temperature 0, else coupled: ``argmax_v(log p'(v) + G[position, v])`` with noise keyed
    by ``(seed, position)``, where position is the token's index in the session's log. So one seed,
    log and model give the same tokens whatever shares the batch, with speculation or without.

    ``next`` and ``verify`` choose and change nothing; ``observe`` is how a committed token enters
    the penalties and moves the position on. Not thread-safe.
    """

    def __init__(self, params: SamplingParams, log: Sequence[int], vocab_size: int) -> None:
        """``log`` is the session's, this step's prompt tokens included; ``vocab_size`` the width of
        the logits. Raises RequestError for parameters that cannot be honoured."""
        validate(params, vocab_size)
        self._params = params
        self._vocab_size = vocab_size
        self._position = len(log)
        self._counts = _counts_for(params, log, vocab_size)
        self._processors = Processors(params, self._counts)

    @property
    def position(self) -> int:
        """Index in the log of the token that comes next."""
        return self._position

    def next(self, logits: torch.Tensor, mask: torch.Tensor | None = None) -> int:
        """The token that comes next.

        ``logits`` is the target's row, ``[V]`` of any float dtype; ``mask`` is the grammar's,
        ``[words] int32``, None where everything is legal.

        Raises GrammarError where the mask allows nothing and BackendError where no maximum exists.
        """
        row = self._row(logits)
        if self._params.temperature > 0.0:
            noise = Noise(self._params.seed, Stream.TARGET, self._position)
            return coupled_choice(self._processors.sampled(row, mask), noise)
        if mask is not None and not self._processors.rewrites_logits:
            # The best of all tokens is the best of the legal ones whenever it is legal itself.
            favourite = greedy_choice(Candidates(row))
            if is_allowed(mask, favourite):
                return favourite
        return greedy_choice(self._processors.scored(row, mask))

    def verify(
        self,
        logits: torch.Tensor,
        drafts: Sequence[int],
        masks: Sequence[torch.Tensor | None] | None = None,
    ) -> Acceptance:
        """How many of the ``n`` drafts the target would have written itself, and what comes next.

        ``logits`` is ``[n + 1, V]``: row k follows the log and the first k drafts, and so do its
        penalties, its noise and ``masks[k]``. A draft is accepted iff it equals that row's own
        choice, so an illegal draft ends the block and no later row or mask is looked at: ``masks``
        may end with the mask that rules it out.
        """
        if logits.shape[0] != len(drafts) + 1:
            raise ValueError(
                f"{len(drafts)} drafts need {len(drafts) + 1} rows of logits, not {logits.shape[0]}"
            )
        accepted = 0
        try:
            while True:
                token = self.next(logits[accepted], None if masks is None else masks[accepted])
                if accepted == len(drafts) or token != drafts[accepted]:
                    return Acceptance(accepted, token)
                self.observe(token)
                accepted += 1
        finally:
            self._forget(accepted)

    def probabilities(self, logits: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """p' of the token that comes next, ``[V] float64``; a single 1 when greedy.

        For rejection sampling (both sides: target and drafter) and for calibration.
        """
        dense = np.zeros(self._vocab_size)
        row = self._row(logits)
        if self._params.temperature == 0.0:
            dense[greedy_choice(self._processors.scored(row, mask))] = 1.0
            return torch.from_numpy(dense)
        kept = self._processors.sampled(row, mask)
        weights = np.exp(kept.logits.astype(np.float64) - kept.logits[kept.argmax()])
        dense[kept.token_ids()] = weights / weights.sum()
        return torch.from_numpy(dense)

    def observe(self, *tokens: int) -> None:
        """``tokens`` were committed to the log, in this order."""
        if self._counts is not None:
            for token in tokens:
                self._counts.push(token)
        self._position += len(tokens)

    def _forget(self, count: int) -> None:
        if self._counts is not None:
            for _ in range(count):
                self._counts.pop()
        self._position -= count

    def _row(self, logits: torch.Tensor) -> NDArray[np.float32]:
        if logits.shape != (self._vocab_size,):
            raise ValueError(
                f"a row of logits is [{self._vocab_size}] here, not {list(logits.shape)}"
            )
        row: NDArray[np.float32] = logits.detach().to("cpu", torch.float32).contiguous().numpy()
        return row


def _counts_for(params: SamplingParams, log: Sequence[int], vocab_size: int) -> TokenCounts | None:
    """What the penalties in use look at: nothing, the output, or the whole log."""
    if params.repetition_penalty != 1.0:
        # Ids past the logits (a tokenizer may know more) have nothing to be penalised.
        return TokenCounts([token for token in log if token < vocab_size])
    if params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
        return TokenCounts(())
    return None
