"""Which steps share the next pass and how many tokens each brings: policy only, no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


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


def plan(pending: Sequence[int], limits: Limits) -> list[int]:
    """Rows of each running step in the next pass, 0 for those that sit it out.

    ``pending[i]`` >= 1 is how many tokens step i has to compute, steps in order of arrival. All
    decoding steps take part whole; prefills share the rows left to them, first come first served,
    so none starves: every pass moves the oldest on.
    """
    decoding = [count <= limits.decode_rows for count in pending]
    room = limits.mixed_rows if any(decoding) else limits.prefill_rows
    rows = []
    for count, small in zip(pending, decoding, strict=True):
        taken = count if small else min(count, room)
        if not small:
            room -= taken
        rows.append(taken)
    return rows
