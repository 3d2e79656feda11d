"""One token out of a row: the most likely one, or a sample under keyed noise."""

from __future__ import annotations

import numpy as np

from dspark_backend.sampling.candidates import Candidates
from dspark_backend.sampling.noise import Noise

# Rows up to this long are evaluated as defined; longer ones are first thinned out by a bound.
_DIRECT_ROWS = 2048
# Relative room for float32 rounding in the bound: of the draw, exp and two products, about 1e-6.
_SLACK = 1.0 + 1e-4


def greedy_choice(candidates: Candidates) -> int:
    """The most likely token id; ties go to the lowest id."""
    return candidates.token(candidates.argmax())


def coupled_choice(candidates: Candidates, noise: Noise) -> int:
    """``argmax_v(logits_v + G_v)`` in float64, ties to the lowest id: a sample of
    softmax(logits) (the Gumbel-max trick; Maddison et al. 2014).

    Over a whole vocabulary it is found without computing G: with ``E_v = exp(-G_v)`` exponential,
    the argmax is the least ``E_v / p_v``, and ``E_v = -log1p(-w_v) >= w_v >= c_v 2**-32`` for the
    draw's coarse bits. Whoever has ``c_v 2**-32 > B p_v`` for the ratio B of *any* token cannot
    win. B is that of the token with the least estimate, so only a handful is left to evaluate.
    """
    best = candidates.argmax()
    if len(candidates.logits) > _DIRECT_ROWS:
        candidates = _contenders(candidates, candidates.logits[best], noise)
    ids = candidates.token_ids()
    scores = candidates.logits.astype(np.float64) + noise.gumbel(ids.astype(np.uint32))
    return int(ids[scores.argmax()])


def _contenders(candidates: Candidates, peak: np.float32, noise: Noise) -> Candidates:
    """A subset of ``candidates`` that holds the winner."""
    ids = candidates.token_ids().astype(np.uint32)
    weights = np.exp(candidates.logits - peak)
    floor = noise.coarse(ids).astype(np.float32)
    floor *= np.float32(2.0**-32)
    # Only to pick the token whose exact ratio is the bound; half a coarse step keeps 0 / 0 away.
    estimate = floor + np.float32(2.0**-33)
    with np.errstate(divide="ignore", over="ignore"):
        estimate /= weights
    rival = int(estimate.argmin())
    exact = float(noise.exponential(ids[rival : rival + 1])[0]) / float(weights[rival])
    weights *= np.float32(exact * _SLACK)
    kept = np.flatnonzero(floor <= weights)
    return Candidates(candidates.logits[kept], candidates.token_ids()[kept])
