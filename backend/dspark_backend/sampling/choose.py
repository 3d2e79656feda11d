"""One token out of a row: the most likely one, or a sample under keyed noise."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

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

    Raises BackendError where the row has no usable maximum.
    """
    peak = candidates.argmax()
    ids = candidates.token_ids()
    if len(ids) > _FIRST_HEAT:
        return _race(candidates.logits, ids, peak, noise)
    return int(ids[(candidates.logits + noise.gumbel(ids)).argmax()])


def sample(probabilities: torch.Tensor, noise: Noise) -> int:
    """A draw from ``probabilities`` (``[V] float64``, non-negative, not necessarily normalised).

    The plain form, for the streams of rejection sampling (:mod:`dspark_backend.sampling.verify`).
    """
    weights: NDArray[np.float64] = probabilities.numpy()
    ids = np.flatnonzero(weights).astype(np.uint32)
    return int(ids[(np.log(weights[ids]) + noise.gumbel(ids)).argmax()])


def _race(
    logits: NDArray[np.float32], ids: NDArray[np.uint32], peak_index: int, noise: Noise
) -> int:
    """The same argmax over a long row, without computing most of G.

    With ``E_v = exp(-G_v)`` exponential, the argmax is the token with the least ``E_v / p_v``, and
    ``E_v = -log1p(-w_v) >= w_v >= floor_v`` for the draw's coarse bits. Whoever has
    ``floor_v > B * p_v``, where B is the ratio of any token at all, cannot win; a handful is left
    to evaluate as defined. (p is in units of the peak's probability here.)
    """
    peak = logits[peak_index]
    best_score, best_token = -math.inf, -1
    # Only a bound: the peak token itself takes part in its own heat.
    bound = float(noise.exponential(ids[peak_index : peak_index + 1])[0])
    for heat in _heats(len(ids)):
        reach = np.exp(logits[heat] - peak)
        reach *= np.float32(bound * _SLACK)
        near = heat.start + np.flatnonzero(noise.floor(ids[heat]) <= reach)
        if len(near) == 0:
            continue
        scores = logits[near] + noise.gumbel(ids[near])
        winner = int(scores.argmax())
        if scores[winner] > best_score:
            best_score, best_token = float(scores[winner]), int(ids[near[winner]])
            bound = min(bound, math.exp(float(peak) - best_score))
    return best_token


def _heats(length: int) -> Iterator[slice]:
    start, size = 0, _FIRST_HEAT
    while start < length:
        yield slice(start, start + size)
        start, size = start + size, min(size * _HEAT_GROWTH, _LONGEST_HEAT)
