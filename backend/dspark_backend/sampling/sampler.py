"""What the engine holds per running step: its parameters, its noise and what it has written."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from dspark_backend.grammar.bitmask import is_allowed
from dspark_backend.request import AcceptanceRule, SamplingParams
from dspark_backend.sampling.candidates import Candidates
from dspark_backend.sampling.choose import coupled_choice, greedy_choice
from dspark_backend.sampling.counts import TokenCounts
from dspark_backend.sampling.noise import Noise, Stream
from dspark_backend.sampling.params import validate
from dspark_backend.sampling.processors import Processors
from dspark_backend.sampling.verify import Acceptance, correction, passes
from dspark_backend.speculation.distribution import Distribution


class Sampler:
    """Chooses the tokens of one step.

    Greedy at temperature 0, else coupled: ``argmax_v(log p'(v) + G[position, v])`` with noise keyed
    by ``(seed, position)``, where position is the token's index in the session's log. So one seed,
    log and model give the same tokens whatever shares the batch, with speculation or without.
    Where the parameters ask for rejection sampling, ``draft`` samples drafts from q' and ``verify``
    holds them against p': the same distribution, with streams of noise of their own.

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
    def params(self) -> SamplingParams:
        """The step's own."""
        return self._params

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self._vocab_size

    @property
    def rejects(self) -> bool:
        """Whether drafts are sampled and verified by rejection sampling."""
        params = self._params
        return params.temperature > 0.0 and params.acceptance == AcceptanceRule.REJECTION

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
        distributions: Sequence[Distribution | None] = (),
    ) -> Acceptance:
        """How many of the ``n`` drafts stand, and what comes next.

        ``logits`` is ``[n + 1, V]``: row k follows the log and the first k drafts, and so do its
        penalties, its noise and ``masks[k]``. Greedy and coupled, a draft is accepted iff it equals
        that row's own choice, so an illegal draft ends the block and no later row or mask is looked
        at: ``masks`` may end with the mask that rules it out. By rejection sampling it is accepted
        as :func:`verify_rejection` does, ``distributions[k]`` being what it was drawn from (None,
        or none given: it is a function of the context).
        """
        if logits.shape[0] != len(drafts) + 1:
            raise ValueError(
                f"{len(drafts)} drafts need {len(drafts) + 1} rows of logits, not {logits.shape[0]}"
            )
        rows = masks or [None] * len(logits)
        accepted = 0
        try:
            for draft, row, mask in zip(drafts, logits, rows, strict=False):
                drawn = distributions[accepted] if distributions else None
                token = self._instead(draft, row, mask, drawn)
                if token is not None:
                    return Acceptance(accepted, token)
                self.observe(draft)
                accepted += 1
            return Acceptance(accepted, self._after(logits[accepted], rows[accepted]))
        finally:
            self._forget(accepted)

    def draft(
        self,
        logits: NDArray[np.float32],
        mask: torch.Tensor | None,
        prefix: Sequence[int],
        *,
        anchor: int,
        slot: int,
    ) -> tuple[int, Distribution] | None:
        """A draw from q', the draft distribution after this step's processors, and q' itself.

        ``logits`` is the drafter's row, ``[V]`` (-inf: it cannot say that); ``prefix`` are the
        drafts before it, which the penalties see; ``anchor`` (a position) and ``slot`` key the
        noise. None where nothing has any probability.

        Raises BackendError for a row with a NaN.
        """
        self.observe(*prefix)
        try:
            scored = self._processors.scored(logits, mask)
        finally:
            self._forget(len(prefix))
        if scored.logits.max() == -np.inf:
            return None
        scored.argmax()
        kept = self._processors.truncated(scored.at_least(float(np.finfo(np.float32).min)))
        noise = Noise(self._params.seed, Stream.DRAFT, anchor, slot)
        return coupled_choice(kept, noise), Distribution(kept.token_ids(), _softmax(kept))

    def counted(self, drafts: Sequence[int]) -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """What the penalties see at each row of a block of ``drafts``: token ids, and how often
        this step's output holds each; of nothing where no penalty is on."""
        rows = []
        for draft in (*drafts, None):
            if self._counts is None:
                rows.append((np.zeros(0, np.int64), np.zeros(0, np.float32)))
                continue
            rows.append((self._counts.ids.copy(), self._counts.counts.copy()))
            if draft is not None:
                self._counts.push(draft)
        if self._counts is not None:
            for _ in drafts:
                self._counts.pop()
        return rows

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
        dense[kept.token_ids()] = _softmax(kept)
        return torch.from_numpy(dense)

    def observe(self, *tokens: int) -> None:
        """``tokens`` were committed to the log, in this order."""
        if self._counts is not None:
            for token in tokens:
                self._counts.push(token)
        self._position += len(tokens)

    def _instead(
        self, draft: int, row: torch.Tensor, mask: torch.Tensor | None, drawn: Distribution | None
    ) -> int | None:
        """What ``row`` puts in the place of ``draft``; None where the draft stands."""
        if not self.rejects:
            token = self.next(row, mask)
            return None if token == draft else token
        key = {"seed": self._params.seed, "position": self._position}
        p = self.probabilities(row, mask)
        q = drawn or Distribution(np.array([draft], np.uint32), np.ones(1))
        if passes(float(p[draft]), q.of(draft), **key):
            return None
        return correction(p, torch.from_numpy(q.dense(self._vocab_size)), **key)

    def _after(self, row: torch.Tensor, mask: torch.Tensor | None) -> int:
        """The token that follows the last draft."""
        if not self.rejects:
            return self.next(row, mask)
        noise = Noise(self._params.seed, Stream.RESIDUAL, self._position)
        return coupled_choice(self._processors.sampled(self._row(row), mask), noise)

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


def _softmax(kept: Candidates) -> NDArray[np.float64]:
    """Of the candidates' logits, [N]; they have a maximum."""
    weights = np.exp(kept.logits.astype(np.float64) - kept.logits[kept.argmax()])
    normalised: NDArray[np.float64] = weights / weights.sum()
    return normalised


def _counts_for(params: SamplingParams, log: Sequence[int], vocab_size: int) -> TokenCounts | None:
    """What the penalties in use look at: nothing, the output, or the whole log."""
    if params.repetition_penalty != 1.0:
        # Ids past the logits (a tokenizer may know more) have nothing to be penalised.
        return TokenCounts([token for token in log if token < vocab_size])
    if params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
        return TokenCounts(())
    return None
