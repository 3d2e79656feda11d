"""Top-k, top-p and min-p, each as a cutoff: the smallest logit that survives.

All three keep a *level set* ``{v : logit_v >= cutoff}``. That settles ties: tokens of equal logit
live or die together, whatever the order of ids (bf16 models tie often). It is also what makes them
cheap: the row is never sorted, only searched.

The definitions are those of transformers' warpers, except that its top-p splits a tie at the
boundary by sort order.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

# Bands up to this long are sorted; longer ones are split first.
_SORTED_BAND = 1024
# How many of a band's logits are looked at to find where to split it.
_PIVOT_SAMPLE = 512


def top_k_cutoff(logits: NDArray[np.float32], k: int) -> float:
    """The ``k``-th largest of ``logits`` (``[N]``); the smallest where ``k`` exceeds N.

    Fan et al. 2018. Every token that ties with the k-th is kept.
    """
    return _smallest_head(logits, np.ones_like, float(k))


def top_p_cutoff(logits: NDArray[np.float32], p: float) -> float:
    """The logit that ends the nucleus: the fewest most likely tokens whose mass reaches ``p``.

    Holtzman et al. 2020. At least the most likely token is kept; so is every tie at the boundary.
    """
    peak = logits.max()

    def mass(part: NDArray[np.float32]) -> NDArray[np.float32]:
        weights: NDArray[np.float32] = part - peak
        np.exp(weights, out=weights)
        return weights

    return _smallest_head(logits, mass, p * float(mass(logits).sum(dtype=np.float64)))


def min_p_cutoff(logits: NDArray[np.float32], min_p: float) -> float:
    """The logit of a token ``min_p`` times as likely as the peak (Nguyen et al. 2024)."""
    return float(logits.max()) + math.log(min_p)


def _smallest_head(
    logits: NDArray[np.float32],
    weigh: Callable[[NDArray[np.float32]], NDArray[np.float32]],
    wanted: float,
) -> float:
    """The cutoff of the smallest level set whose summed weights reach ``wanted``; the smallest
    logit if none does.

    A three-way quickselect from the top. The pivots lie high in the band, since the answer
    usually does, until one turns out to lie above it.
    """
    band, ahead, pivot_share = logits, 0.0, 1 / 32
    cutoff = np.float32(math.inf)
    while len(band) > _SORTED_BAND:
        sample = np.sort(band[:: len(band) // _PIVOT_SAMPLE])
        cutoff = sample[-int(len(sample) * pivot_share)]
        # compress() is up to six times as fast as indexing with a bool array.
        upper = band.compress(band > cutoff)
        through_upper = ahead + float(weigh(upper).sum(dtype=np.float64))
        if through_upper >= wanted:
            band = upper
            continue
        ahead = through_upper + float(weigh(band.compress(band == cutoff)).sum(dtype=np.float64))
        if ahead >= wanted:
            return float(cutoff)
        band, pivot_share = band.compress(band < cutoff), 1 / 2
    band = np.sort(band)[::-1]
    index = int(np.searchsorted(ahead + weigh(band).cumsum(dtype=np.float64), wanted))
    # Sums in another order than that of ``wanted`` may fall short of it by a rounding error.
    return float(band[min(index, len(band) - 1)] if len(band) else cutoff)
