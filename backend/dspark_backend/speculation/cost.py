"""What a cycle costs in seconds: measured at load, corrected by every cycle (DSPARK.md, section 5).

There is no "unknown": a model of the cost exists from the first cycle on, so no policy has to guess
and verify everything. Left out is what a written token costs whatever the budget was: choosing it
(0.1 ms greedily and 1 ms sampled, of 152 k logits) and its place in the drafter's context.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from statistics import median
from typing import Protocol

from dspark_backend.speculation.cost_table import CostTable
from dspark_backend.speculation.curve import Curve
from dspark_backend.speculation.drift import Drift, Share

_REMEMBERED = 256  # cycles whose errors :attr:`CostModel.median_error` looks at
_STALE = math.log(1.25)  # a factor past this makes the kept table worth replacing,
_SURE = 64.0  # once this many cycles said so


class CycleCost(Protocol):
    """What policies ask: seconds of the two parts of a cycle that depend on their decision."""

    def verify_s(self, rows: int, requests: int, context: int) -> float:
        """One pass of the target over ``rows`` rows of ``requests`` sequences, which hold
        ``context`` positions before those rows in all (the sum over the sequences)."""

    def draft_s(self, anchors: int) -> float:
        """One call of the drafter for that many anchors; 0.0 for none or without a drafter."""


class CostModel:
    """A :class:`CycleCost` from a table, which follows the machine as cycles are observed.

    Between the table's points costs are interpolated linearly, past the last one they go on with
    the slope that led there. Rows are taken to be spread evenly over the sequences of a pass.
    Written by the engine's thread alone; any thread may read.
    """

    def __init__(self, table: CostTable) -> None:
        self.table = table
        self._verify = Curve(table.rows, table.verify_s)
        self._draft = Curve(table.anchors, table.draft_s) if table.anchors else None
        self._verify_drift = Drift(len(table.rows))
        self._draft_drift = Drift(1)
        self._errors: deque[float] = deque(maxlen=_REMEMBERED)

    def verify_s(self, rows: int, requests: int, context: int) -> float:
        """See :class:`CycleCost`. Raises ValueError unless there are at least as many rows as
        requests, and one of them."""
        if not 1 <= requests <= rows or context < 0:
            raise ValueError(
                f"no pass has {rows} rows of {requests} sequences over {context} positions"
            )
        expected = self._expected(rows, requests, context)
        return expected * self._verify_drift.factor(self._shares(rows))

    def draft_s(self, anchors: int) -> float:
        """See :class:`CycleCost`."""
        if anchors < 0:
            raise ValueError(f"no call of a drafter has {anchors} anchors")
        if self._draft is None or not anchors:
            return 0.0
        return self._draft.at(anchors) * self._draft_drift.factor(_ONLY)

    def observe(
        self,
        rows: int,
        requests: int,
        context: int,
        anchors: int,
        verify_s: float,
        draft_s: float,
    ) -> None:
        """Learn from a cycle: the arguments of :meth:`verify_s` and :meth:`draft_s`, and the
        seconds that those took. A time that no clock can have measured (0, negative, infinite)
        teaches nothing.

        For passes that verify only: the rows of a prompt want no logits and are cheaper.
        """
        expected = self.verify_s(rows, requests, context)
        if _measurable(verify_s):
            self._errors.append(abs(expected / verify_s - 1.0))
            self._verify_drift.observe(self._shares(rows), verify_s / expected)
        drafting = self.draft_s(anchors)
        if drafting and _measurable(draft_s):
            self._draft_drift.observe(_ONLY, draft_s / drafting)

    @property
    def median_error(self) -> float | None:
        """Median of |predicted / measured - 1| of passes over the last 256 observed cycles, each
        predicted before it was observed; None before the first."""
        return median(self._errors) if self._errors else None

    @property
    def drifted(self) -> bool:
        """Whether cycles have contradicted the table for so long that it should be measured
        again."""
        places = [((index, 1.0),) for index in range(len(self.table.rows))]
        drift = self._verify_drift
        return any(
            drift.seen(index) >= _SURE and abs(math.log(drift.factor(place))) > _STALE
            for index, place in enumerate(places)
        )

    def _expected(self, rows: int, requests: int, context: int) -> float:
        table = self.table
        base = self._verify.at(rows)
        pairs = rows / requests * context - rows * table.context
        more = (
            table.request_s * (requests - 1)
            + table.position_s * (context - table.context)
            + table.pair_s * pairs
        )
        # Less context than the table's makes a pass cheaper, but its products stay.
        return max(base + more, 0.5 * base)

    def _shares(self, rows: int) -> tuple[Share, ...]:
        """The table's points around ``rows``, by nearness."""
        points = self.table.rows
        after = bisect_right(points, rows)
        if after == 0 or after == len(points):
            return ((max(after - 1, 0), 1.0),)
        low, high = points[after - 1], points[after]
        above = (rows - low) / (high - low)
        return ((after - 1, 1.0 - above), (after, above))


_ONLY: tuple[Share, ...] = ((0, 1.0),)


def _measurable(seconds: float) -> bool:
    return math.isfinite(seconds) and seconds > 0.0
