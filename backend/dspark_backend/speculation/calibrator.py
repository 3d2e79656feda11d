"""Confidences that learn from what the target accepts, by step kind and mask width.

A drafter comes with temperatures fitted on held-out rollouts (``drafter/calibration.py``). Where it
is used, text differs: arguments of a call are surer than prose, a mask of two tokens surer than one
of a thousand. Nobody can fit that beforehand for an agent that is not written yet, so it is fitted
as cycles go by.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum
from typing import Final

from dspark_backend.request import StepKind


class MaskWidth(IntEnum):
    """How many tokens the grammar allows: free text, one, few, some, many."""

    FREE = 0
    ONE = 1
    FEW = 32
    SOME = 1024
    MANY = 1 << 31

    @classmethod
    def of(cls, width: int) -> MaskWidth:
        """The bucket of a width; 0 says that nothing is constrained."""
        return next(bucket for bucket in cls if width <= bucket)


# How many observations the shipped calibration weighs as much as, and how fast old ones fade: after
# 500 observations the ones before count for 1 / e.
_PRIOR: Final = 8.0
_KEPT: Final = 1.0 - 1.0 / 500
_MOST: Final = 12.0  # logits beyond this are as good as certain


class _Scaling:
    """Platt scaling ``sigmoid(a x + b)`` of one bucket (Platt 1999), fitted as observations come:
    a Newton step a time, whose step size is the curvature that was seen and not forgotten."""

    __slots__ = ("_curvature_a", "_curvature_b", "a", "b")

    def __init__(self) -> None:
        self.a, self.b = 1.0, 0.0
        self._curvature_a = self._curvature_b = _PRIOR

    def apply(self, logit: float) -> float:
        return _sigmoid(self.a * logit + self.b)

    def observe(self, logit: float, accepted: bool) -> None:
        p = self.apply(logit)
        slope = p * (1.0 - p)
        self._curvature_a = _PRIOR + _KEPT * (self._curvature_a - _PRIOR) + slope * logit * logit
        self._curvature_b = _PRIOR + _KEPT * (self._curvature_b - _PRIOR) + slope
        error = p - accepted
        self.a = min(max(self.a - error * logit / self._curvature_a, 0.05), 20.0)
        self.b = min(max(self.b - error / self._curvature_b, -_MOST), _MOST)


class SurvivalCalibrator:
    """One engine's corrections of a drafter's confidences; used by the engine's thread.

    A scaling for each step kind and :class:`MaskWidth`: memory is bounded by their number. Looks at
    confidences and outcomes of verified tokens only, never at a token that is still to be judged
    (DSPARK.md, section 6).
    """

    def __init__(self) -> None:
        self._scalings: dict[tuple[StepKind, MaskWidth], _Scaling] = {}

    def survival(
        self, kind: StepKind, survival: Sequence[float], widths: Sequence[int]
    ) -> tuple[float, ...]:
        """``survival`` (cumulative, non-increasing) as experience corrects it, likewise.

        ``widths`` says for each token how many the grammar allowed; empty where it allowed all.
        """
        corrected = []
        alive = 1.0
        for conditional, width in zip(conditionals(survival), _all(widths, survival), strict=True):
            if conditional < 1.0 and width != 1:
                scaling = self._scalings.get((kind, MaskWidth.of(width)))
                if scaling is not None:
                    conditional = scaling.apply(_logit(conditional))
            alive *= conditional
            corrected.append(alive)
        return tuple(corrected)

    def observe(
        self,
        kind: StepKind,
        survival: Sequence[float],
        widths: Sequence[int],
        accepted: int,
    ) -> None:
        """Of the verified tokens, whose *uncorrected* ``survival`` is given, the first ``accepted``
        held; the one after them, if there is one, did not, and later ones say nothing."""
        known = zip(conditionals(survival), _all(widths, survival), strict=True)
        for k, (conditional, width) in enumerate(known):
            if k > accepted:
                return
            if conditional < 1.0 and width != 1:
                key = (kind, MaskWidth.of(width))
                scaling = self._scalings.setdefault(key, _Scaling())
                scaling.observe(_logit(conditional), k < accepted)


def conditionals(survival: Sequence[float]) -> list[float]:
    """What each token's survival is given that the ones before it survived."""
    values = []
    before = 1.0
    for value in survival:
        values.append(value / before if before > 0.0 else 0.0)
        before = value
    return values


def _all(widths: Sequence[int], survival: Sequence[float]) -> Sequence[int]:
    return widths or (MaskWidth.FREE,) * len(survival)


def _logit(p: float) -> float:
    return min(max(math.log(p / (1.0 - p)) if p > 0.0 else -_MOST, -_MOST), _MOST)


def _sigmoid(x: float) -> float:
    return 0.5 * (1.0 + math.tanh(0.5 * x))
