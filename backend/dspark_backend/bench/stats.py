"""Order statistics of small samples, as the reports state them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def median(values: Iterable[float | None]) -> float | None:
    """The middle of ``values`` (the mean of the two middle ones); ``None`` entries do not count."""
    ordered = sorted(value for value in values if value is not None)
    if not ordered:
        return None
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2


def percentile(values: Sequence[float], share: float) -> float | None:
    """The nearest-rank percentile: the smallest value that at least ``share`` of all do not exceed.

    ``share`` lies in (0, 1]. With few values this is one of them, never an interpolation.
    """
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share must lie in (0, 1], not {share}")
    if not values:
        return None
    ordered = sorted(values)
    return ordered[math.ceil(share * len(ordered)) - 1]


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """``numerator / denominator``; ``None`` where either is missing or the denominator is 0."""
    if numerator is None or not denominator:
        return None
    return numerator / denominator
