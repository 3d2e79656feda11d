"""One token out of a row: the most likely one, or a sample under keyed noise."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from dspark_backend.sampling.candidates import Candidates
from dspark_backend.sampling.noise import Noise

# Room for float32 rounding in the bound (the draw, exp and two products: about 1e-6 relative).
_SLACK = 1.0 + 1e-4
# The race is run in heats: a short one first, which tightens the bound, then longer ones, whose
# scratch arrays still fit the second-level cache.
_FIRST_HEAT = 1024
_HEAT_GROWTH = 8
_LONGEST_HEAT = 32768


def greedy_choice(candidates: Candidates) -> int:
    """The most likely token id; ties go to the lowest id."""
    return candidates.token(candidates.argmax())


def coupled_choice(candidates: Candidates, noise: Noise) -> int:
    """``argmax_v(logits_v + G_v)`` in float64, ties to the lowest id: a sample of
    softmax(logits) (the Gumbel-max trick; Maddison et al. 2014).

    Most of G is never computed. With ``E_v = exp(-G_v)`` exponential, the argmax is the token with
    the least ``E_v / p_v``, and ``E_v = -log1p(-w_v) >= w_v >= c_v * 2**-32`` for the draw's coarse
    bits c. Whoever has ``c_v * 2**-32 > B * p_v``, where B is the ratio of any token at all, cannot
    win; a handful is left to evaluate.
    """
    peak_index = candidates.argmax()
    peak = candidates.logits[peak_index]
    ids = candidates.token_ids()
    best_score, best_token = -math.inf, -1
    # Only a bound: the peak token itself takes part in its own heat.
    bound = float(noise.exponential(ids[peak_index : peak_index + 1])[0])
    for heat in _heats(len(ids)):
        weights = np.exp(candidates.logits[heat] - peak)
        weights *= np.float32(bound * _SLACK)
        near = np.flatnonzero(noise.floor(ids[heat]) <= weights)
        if len(near) == 0:
            continue
        scores = candidates.logits[heat][near].astype(np.float64)
        scores += noise.gumbel(ids[heat][near])
        winner = int(scores.argmax())
        if scores[winner] > best_score:
            best_score, best_token = float(scores[winner]), int(ids[heat][near[winner]])
            bound = min(bound, math.exp(float(peak) - best_score))
    return best_token


def _heats(length: int) -> Iterator[slice]:
    start, size = 0, _FIRST_HEAT
    while start < length:
        yield slice(start, start + size)
        start, size = start + size, min(size * _HEAT_GROWTH, _LONGEST_HEAT)
