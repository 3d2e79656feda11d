"""Top-k, top-p and min-p, each as a cutoff: the smallest logit that survives.

All three keep a *level set* ``{v : logit_v >= cutoff}``. That settles ties: tokens of equal logit
live or die together, whatever the order of ids (bf16 models tie often). It is also what makes them
cheap: only the head of the row is ever sorted.

The definitions are those of transformers' warpers, except that its top-p splits a tie at the
boundary by sort order.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

# Nats below the peak at which the head of a row is cut off, in the order tried. A language model's
# nucleus is nearly always within the first two; the last takes the whole row.
_DEPTHS = (4.0, 10.0, 20.0, math.inf)


def top_k_cutoff(logits: NDArray[np.float32], k: int) -> float:
    """The ``k``-th largest of ``logits`` (``[N]``); the smallest where ``k`` exceeds N.

    Fan et al. 2018. Every token that ties with the k-th is kept.
    """
    if k >= len(logits):
        return float(logits.min())
    peak = logits.max()
    for depth in _DEPTHS:
        head = logits[logits >= peak - np.float32(depth)]
        if len(head) >= k:
            break
    return float(np.partition(head, len(head) - k)[len(head) - k])


def top_p_cutoff(logits: NDArray[np.float32], p: float) -> float:
    """The logit that ends the nucleus: the fewest most likely tokens whose mass reaches ``p``.

    Holtzman et al. 2020. At least the most likely token is kept; so is every tie at the boundary.
    """
    peak = logits.max()
    wanted = p * float(np.exp(logits - peak).sum(dtype=np.float64))
    for depth in _DEPTHS:
        head = np.sort(logits[logits >= peak - np.float32(depth)])[::-1]
        mass = np.exp(head - peak).cumsum(dtype=np.float64)
        if mass[-1] >= wanted:
            break
    # The total above was summed in another order; rounding may leave it out of reach by a hair.
    return float(head[min(int(np.searchsorted(mass, wanted)), len(head) - 1)])


def min_p_cutoff(logits: NDArray[np.float32], min_p: float) -> float:
    """The logit of a token ``min_p`` times as likely as the peak (Nguyen et al. 2024)."""
    return float(logits.max()) + math.log(min_p)
