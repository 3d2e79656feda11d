"""What drafts have been worth lately, by step kind: for deciding whether to draft at all."""

from __future__ import annotations

from collections import deque
from typing import Final

from dspark_backend.request import StepKind

_REMEMBERED: Final = 16
_PROBE_EVERY: Final = 24
_HOPE: Final = 0.8


class Outlook:
    """The calibrated survivals of the latest drafts of each step kind; used by the engine's thread.

    A kind that nobody has drafted for is hoped for (each slot survives with 0.8), so that it is
    tried; one that is parked is tried again every 24 cycles, since text changes.
    """

    def __init__(self, block_size: int) -> None:
        self._hope = tuple(_HOPE ** (k + 1) for k in range(block_size))
        self._recent: dict[StepKind, deque[tuple[float, ...]]] = {}
        self._parked: dict[StepKind, int] = {}

    def expected(self, kind: StepKind) -> tuple[float, ...]:
        """The mean survival of every slot; a slot that a draft did not have counts as 0."""
        recent = self._recent.get(kind)
        if not recent:
            return self._hope
        longest = max(map(len, recent))
        sums = [0.0] * longest
        for survival in recent:
            for k, value in enumerate(survival):
                sums[k] += value
        return tuple(total / len(recent) for total in sums)

    def drafted(self, kind: StepKind, survival: tuple[float, ...]) -> None:
        """The drafter was asked, and this is what its block is expected to be worth."""
        self._recent.setdefault(kind, deque(maxlen=_REMEMBERED)).append(survival)
        self._parked[kind] = 0

    def parked(self, kind: StepKind) -> bool:
        """The drafter does not pay for this kind now: True where it is not to be asked, False every
        24th time."""
        self._parked[kind] = self._parked.get(kind, 0) + 1
        return self._parked[kind] % _PROBE_EVERY != 0
