"""Seconds over a count, as measured at a few counts: the piecewise linear curve through them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence


class Curve:
    """Linear between the points and, after the last, by the slope that led there.

    The points keep their measured shape, jags included: kernels work in tiles, and a smoothed curve
    would hide where one more row is free and where it starts another tile.
    """

    def __init__(self, counts: Sequence[int], seconds: Sequence[float]) -> None:
        """``counts`` ascend from at least 1, ``seconds`` are positive, one for each."""
        self._counts = tuple(counts)
        self._seconds = tuple(seconds)
        slope = 0.0
        if len(counts) > 1:
            slope = (seconds[-1] - seconds[-2]) / (counts[-1] - counts[-2])
        # A last pair that noise turned round would make any number of further rows free; what a row
        # costs on average at the last point errs on the other side.
        self._slope = slope if slope > 0.0 else seconds[-1] / counts[-1]

    def at(self, count: int) -> float:
        """Seconds for ``count``; below the first point those of the first."""
        counts, seconds = self._counts, self._seconds
        if count >= counts[-1]:
            return seconds[-1] + (count - counts[-1]) * self._slope
        if count <= counts[0]:
            return seconds[0]
        after = bisect_right(counts, count)
        low, high = counts[after - 1], counts[after]
        share = (count - low) / (high - low)
        return seconds[after - 1] + share * (seconds[after] - seconds[after - 1])
