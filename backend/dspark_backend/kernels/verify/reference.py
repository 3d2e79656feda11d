"""Verification row by row in torch float64: the oracle of ``triton.py``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dspark_backend.kernels.contract import Masks
from dspark_backend.kernels.verify.contract import (
    Batch,
    DraftProbabilities,
    Rule,
    Stream,
    Verdict,
)

Uniforms = Callable[[int, Stream, int], Tensor]
"""``(seed, stream, position)`` to the uniform draws in (0, 1) of all token ids, [V] float64."""


def verify(batch: Batch, uniforms: Uniforms) -> Verdict:
    """What :func:`dspark_backend.kernels.verify.triton.verify` computes, under the noise of
    ``uniforms``: :meth:`dspark_backend.sampling.noise.Noise.uniform`, where the two must agree."""
    rule_of = {
        Rule.GREEDY: _longest_match,
        Rule.COUPLED: _longest_match,
        Rule.REJECTION: _rejection,
    }
    verdicts = [
        rule_of[Rule(int(batch.rules[b]))](batch, b, uniforms) for b in range(batch.requests)
    ]
    both = torch.tensor(verdicts, dtype=torch.int32, device=batch.logits.device).reshape(-1, 2)
    return Verdict(both[:, 0].contiguous(), both[:, 1].contiguous())


def _longest_match(batch: Batch, b: int, uniforms: Uniforms) -> tuple[int, int]:
    """Each row chooses; a draft stands iff it is what its row chose."""
    first, last = int(batch.offsets[b]), int(batch.offsets[b + 1]) - 1
    for row in range(first, last + 1):
        accepted = row - first
        scores = scaled(batch, b, row)
        usable = _has_maximum(scores)
        if int(batch.rules[b]) == Rule.COUPLED:
            position = int(batch.positions[b]) + accepted
            scores = scores + _gumbel(uniforms(int(batch.seeds[b]), Stream.TARGET, position))
        choice = int(scores.argmax()) if usable else -1
        if row == last or choice < 0 or choice != int(batch.drafts[row]):
            return accepted, choice
    raise ValueError(f"request {b} has no row: a block has at least one")


def _rejection(batch: Batch, b: int, uniforms: Uniforms) -> tuple[int, int]:
    """Leviathan et al. 2023, Chen et al. 2023: accept x with probability min(1, p(x) / q(x)), on
    the first rejection emit a sample of the normalised (p - q)+, after none one of p."""
    first, last = int(batch.offsets[b]), int(batch.offsets[b + 1]) - 1
    seed = int(batch.seeds[b])
    for row in range(first, last + 1):
        accepted, position = row - first, int(batch.positions[b]) + row - first
        scores = scaled(batch, b, row)
        if not _has_maximum(scores):
            return accepted, -1
        p = torch.softmax(scores, dim=0)
        if row < last:
            draft = int(batch.drafts[row])
            q, q_draft = _draft_distribution(batch.q, row, draft, len(p))
            p_draft = float(p[draft]) if 0 <= draft < len(p) else 0.0
            if float(uniforms(seed, Stream.ACCEPT, position)[0]) * q_draft < p_draft:
                continue
            residual = (p - q).clamp(min=0.0)
            # No mass left means p = q but for rounding, and then p is the residual's limit.
            p = residual if residual.sum() > 0.0 else p
        noise = _gumbel(uniforms(seed, Stream.RESIDUAL, position))
        return accepted, int((p.log() + noise).argmax())
    raise ValueError(f"request {b} has no row: a block has at least one")


def scaled(batch: Batch, b: int, row: int) -> Tensor:
    """The row's logits over its request's temperature (in float32, as plain decoding divides
    them), -inf where the grammar forbids: [V] float64."""
    logits = batch.logits[row].float()
    if int(batch.rules[b]) != Rule.GREEDY:
        logits = logits / batch.temperatures[b]
    legal = _legal(batch.masks, row, len(logits)).to(logits.device)
    return torch.where(legal, logits, -torch.inf).double()


def _legal(masks: Masks | None, row: int, vocab: int) -> Tensor:
    if masks is None or int(masks.of_row[row]) < 0:
        return torch.ones(vocab, dtype=torch.bool)
    words = masks.words[int(masks.of_row[row])].tolist()
    return torch.tensor(
        [v >> 5 < len(words) and bool(words[v >> 5] >> (v & 31) & 1) for v in range(vocab)]
    )


def _draft_distribution(
    given: DraftProbabilities | None, row: int, draft: int, vocab: int
) -> tuple[Tensor, float]:
    """q' over token ids, [V] float64, and what it says of the draft."""
    if given is None or int(given.of_row[row]) < 0:
        certain = torch.arange(vocab) == draft
        return certain.double(), 1.0
    over_drafter = given.q[int(given.of_row[row])].double()
    q = over_drafter
    if given.columns is not None:
        columns = given.columns.long()
        q = torch.where(columns >= 0, over_drafter[columns.clamp(min=0)], 0.0)
    # A token that q' never gives cannot have been drawn: it counts as certain, and is rejected.
    return q, float(q[draft]) if 0 <= draft < vocab else 1.0


def _has_maximum(scores: Tensor) -> bool:
    return bool(torch.isfinite(scores.max()))


def _gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel draws ``-log(-log1p(-w))``, so that unlikely tokens win at small w."""
    return -(-torch.log1p(-uniform)).log()
