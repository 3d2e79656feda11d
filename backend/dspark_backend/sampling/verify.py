"""Speculative verification on plain arrays: readable, and the oracle of anything faster.

Rows are p' or its logits, after *all* processors and the grammar mask: row k is conditioned on the
first k drafts. Every rule accepts the longest valid prefix and emits one more token, the correction
or the bonus (DSPARK.md, sections 1 and 6).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dspark_backend.sampling.choose import sample
from dspark_backend.sampling.noise import Noise, Stream, acceptance_uniform, coupled_noise


@dataclass(frozen=True, slots=True)
class Acceptance:
    """The first ``accepted`` drafts stand; ``next_token`` follows them."""

    accepted: int
    next_token: int


def verify_greedy(logits: torch.Tensor, drafts: Sequence[int]) -> Acceptance:
    """``logits`` ``[n + 1, V]``: a draft stands iff it is its row's argmax (ties: lowest id)."""
    return _longest_match([int(row.argmax()) for row in logits], drafts)


def verify_coupled(
    logits: torch.Tensor, drafts: Sequence[int], *, seed: int, position: int
) -> Acceptance:
    """A draft stands iff it is ``argmax(logits + G)``, the token that plain decoding with this seed
    emits there: exact for any drafter and any scheduler.

    ``logits`` is ``[n + 1, V]``, over temperature, -inf outside the support; row k chooses the
    token at ``position + k``.
    """
    vocab = logits.shape[1]
    return _longest_match(
        [
            int((row.double() + coupled_noise(seed, position + k, vocab)).argmax())
            for k, row in enumerate(logits)
        ],
        drafts,
    )


def verify_rejection(
    p: torch.Tensor, drafts: Sequence[int], q: torch.Tensor, *, seed: int, position: int
) -> Acceptance:
    """Leviathan et al. 2023, Chen et al. 2023: accept ``x`` with probability ``min(1, p(x)/q(x))``,
    on the first rejection emit a sample of the normalised ``(p - q)+``, after none one of ``p_n``.

    ``p`` ``[n + 1, V]`` and ``q`` ``[n, V]`` are float64 probabilities; ``q[k]`` is exactly what
    ``drafts[k]`` was drawn from (one-hot for a deterministic draft), by the noise of
    ``Stream.DRAFT`` at the anchor's position and slot k: an anchor is drafted from once, while a
    position may be drafted again after a rejection. An illegal draft has ``p = 0``: it is rejected
    *into the residual* (cutting the block before it and sampling ``p`` is biased).
    """
    for k, draft in enumerate(drafts):
        p_draft, q_draft = float(p[k, draft]), float(q[k, draft])
        if not passes(p_draft, q_draft, seed=seed, position=position + k):
            return Acceptance(k, correction(p[k], q[k], seed=seed, position=position + k))
    noise = Noise(seed, Stream.RESIDUAL, position + len(drafts))
    return Acceptance(len(drafts), sample(p[len(drafts)], noise))


def passes(p_draft: float, q_draft: float, *, seed: int, position: int) -> bool:
    """The ratio test at ``position``: yes with probability ``min(1, p(x)/q(x))``."""
    return acceptance_uniform(seed, position) * q_draft < p_draft


def correction(p: torch.Tensor, q: torch.Tensor, *, seed: int, position: int) -> int:
    """What is emitted at ``position`` after a rejection; ``p``, ``q`` [V] float64."""
    residual = (p - q).clamp(min=0.0)
    # No mass left means p = q but for rounding, and then p is the residual's limit.
    rest = residual if residual.sum() > 0.0 else p
    return sample(rest, Noise(seed, Stream.RESIDUAL, position))


def _longest_match(choices: Sequence[int], drafts: Sequence[int]) -> Acceptance:
    accepted = 0
    while accepted < len(drafts) and drafts[accepted] == choices[accepted]:
        accepted += 1
    return Acceptance(accepted, choices[accepted])
