"""Which steps share the next pass and how many tokens each brings: policy only, no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dspark_backend.request import Urgency

Precedence = tuple[int, float, int]
"""Sorts before another where it goes first; see :func:`precedence`."""

OLDEST_SHARE = 4
"""The oldest prefill gets at least one part in this many of the rows for prefills."""

_RANK = {Urgency.CRITICAL: 0, Urgency.INTERACTIVE: 1, Urgency.BACKGROUND: 2}
_WEIGHT = {Urgency.CRITICAL: 2.0, Urgency.INTERACTIVE: 1.0, Urgency.BACKGROUND: 0.25}


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one pass.

    ``decode_rows``: a step with at most this many tokens to compute is decoding, one with more is
    prefilling. ``prefill_rows``: rows given to prefills in a pass that no decoding step waits for;
    ``mixed_rows``: when one does, so that a long prompt delays a decoding neighbour by a bounded
    time. ``running``: steps admitted at once; later ones queue.
    """

    decode_rows: int = 32
    prefill_rows: int = 256
    mixed_rows: int = 64
    running: int = 64


def precedence(urgency: Urgency, due: float, arrival: int) -> Precedence:
    """Where a step stands among others: by urgency, then by when it should be over (``inf`` where
    it does not say), then by arrival."""
    return _RANK[urgency], due, arrival


def weight(urgency: Urgency) -> float:
    """What a token of such a step is worth to a budget beside one of an interactive step."""
    return _WEIGHT[urgency]


def plan(
    pending: Sequence[int], limits: Limits, order: Sequence[Precedence] | None = None
) -> list[int]:
    """Rows of each running step in the next pass, 0 for those that sit it out.

    ``pending[i]`` >= 1 is how many tokens step i has to compute, steps in order of arrival. All
    decoding steps take part whole. Prefills share the rows left to them in ``order`` (that of
    arrival when left out); the oldest gets a share in any case, so none starves: every pass moves
    the oldest on.
    """
    rows = [count if count <= limits.decode_rows else 0 for count in pending]
    prefills = [i for i, taken in enumerate(rows) if not taken]
    if not prefills:
        return rows
    room = limits.mixed_rows if len(prefills) < len(rows) else limits.prefill_rows
    oldest = prefills[0]
    if order is not None:
        prefills.sort(key=order.__getitem__)
    rows[oldest] = min(pending[oldest], -(-room // OLDEST_SHARE))
    room -= rows[oldest]
    for i in prefills:
        more = min(pending[i] - rows[i], room)
        rows[i] += more
        room -= more
    return rows
