"""How far what is measured has moved from what was: a robust factor for each point of a curve.

The machine slows down as a whole when something else runs on it, and a point of the curve can be
off by itself because its few measurements were unlucky. So the logarithm of measured over expected
is the sum of a common part, which every observation teaches, and one of the point's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

# Exponential weights. Together 0.15 a cycle: a change of the machine is followed in some twenty
# cycles, a third of a second of decoding, while noise of 10 % moves the factor by 3 %.
_COMMON, _OWN = 0.05, 0.1
# What one observation can claim at most, as a logarithm: a pass that took ten times as long because
# the machine paused says no more than one that took 1.3 times as long: the factor moves by 4 %.
_LOUDEST = 0.25
# Beyond it a factor is no drift but a fault of the clock or of the table.
_FURTHEST = math.log(16.0)

Share = tuple[int, float]
"""A point's index, and its part of an observation between points: parts add up to 1."""


class Drift:
    """Factors for ``points`` points; holds a few numbers a point however long it runs."""

    def __init__(self, points: int) -> None:
        self._common = 0.0
        self._own = [0.0] * points
        self._seen = [0.0] * points

    def factor(self, shares: Sequence[Share]) -> float:
        """What an expectation at that place is to be multiplied by."""
        return math.exp(self._common + sum(part * self._own[index] for index, part in shares))

    def seen(self, index: int) -> float:
        """How many observations a point was taught by."""
        return self._seen[index]

    def observe(self, shares: Sequence[Share], ratio: float) -> None:
        """``ratio`` > 0 is measured over expected, the factor included in what was expected."""
        step = _within(math.log(ratio), _LOUDEST)
        self._common = _within(self._common + _COMMON * step, _FURTHEST)
        for index, part in shares:
            self._own[index] = _within(self._own[index] + _OWN * part * step, _FURTHEST)
            self._seen[index] += part


def _within(value: float, bound: float) -> float:
    return max(-bound, min(bound, value))
