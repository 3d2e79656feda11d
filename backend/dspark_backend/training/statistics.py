"""How good probabilities are: calibration error and ranking, on plain arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BINS = 15


def calibration_error(
    predicted: NDArray[np.float64], happened: NDArray[np.bool_], bins: int = BINS
) -> float:
    """Expected calibration error (Guo et al. 2017), over bins of equal width; 0.0 without samples.

    ``predicted`` [N] in [0, 1], ``happened`` bool [N].
    """
    if not len(predicted):
        return 0.0
    index = np.minimum((predicted * bins).astype(np.int64), bins - 1)
    counts = np.bincount(index, minlength=bins)
    sums = np.bincount(index, weights=predicted, minlength=bins)
    hits = np.bincount(index, weights=happened.astype(np.float64), minlength=bins)
    return float(np.abs(sums - hits)[counts > 0].sum() / len(predicted))


def reliability(
    predicted: NDArray[np.float64], happened: NDArray[np.bool_], bins: int = BINS
) -> list[tuple[float, float, int]]:
    """Of every bin that is not empty: mean prediction, how often it happened, and samples."""
    index = np.minimum((predicted * bins).astype(np.int64), bins - 1)
    rows = []
    for b in range(bins):
        mine = index == b
        if mine.any():
            rows.append(
                (float(predicted[mine].mean()), float(happened[mine].mean()), int(mine.sum()))
            )
    return rows


def ranking(predicted: NDArray[np.float64], happened: NDArray[np.bool_]) -> float:
    """Area under the ROC curve: the chance that what happened was given more than what did not.

    Ties count half; 0.5 where one of the two sides is empty.
    """
    positives = int(happened.sum())
    negatives = len(happened) - positives
    if not positives or not negatives:
        return 0.5
    _, inverse, counts = np.unique(predicted, return_inverse=True, return_counts=True)
    upper = np.cumsum(counts)
    ranks = (upper - (counts - 1) / 2)[inverse]
    won = float(ranks[happened].sum()) - positives * (positives + 1) / 2
    return won / (positives * negatives)
