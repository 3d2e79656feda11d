"""What drafts have been worth lately, to a step and to its kind: for deciding whether to draft."""

from __future__ import annotations

from typing import Final
from weakref import WeakKeyDictionary

from dspark_backend.request import StepKind

_HOPE: Final = 0.8
# Exponential weights of the latest draft, in a step and over all steps of a kind: some four drafts
# and some sixteen. Texts differ more than a text does from one line to the next.
_STEP: Final = 0.25
_KIND: Final = 1.0 / 16
# A parked step is tried again after so many cycles, then after twice as many, up to the longest: a
# try costs a fifth of a cycle, and a text that has become easy half of every cycle.
_SOONEST: Final = 4
_LATEST: Final = 16

Survival = tuple[float, ...]


class Outlook:
    """Running means of the calibrated survivals of drafts; used by the engine's thread.

    A step begins with what drafts of its kind have been worth, and is soon judged by its own: a
    hard text must not cost the next one its drafts. A kind that nobody has drafted for is hoped
    for (each slot survives with 0.8). Steps are told apart by identity and forgotten with it.
    """

    def __init__(self, block_size: int) -> None:
        self._hope = tuple(_HOPE ** (k + 1) for k in range(block_size))
        self._kinds: dict[StepKind, Survival] = {}
        self._steps: WeakKeyDictionary[object, _Own] = WeakKeyDictionary()

    def expected(self, step: object, kind: StepKind) -> Survival:
        """The mean survival of every slot; a slot that a draft did not have counts as 0."""
        own = self._steps.get(step)
        if own is not None and own.mean is not None:
            return own.mean
        return self._kinds.get(kind, self._hope)

    def drafted(self, step: object, kind: StepKind, survival: Survival) -> None:
        """The drafter was asked, and this is what its block is expected to be worth."""
        own = self._steps.setdefault(step, _Own())
        before = self.expected(step, kind) if kind in self._kinds else survival
        own.mean = _moved(before, survival, _STEP)
        self._kinds[kind] = _moved(self._kinds.get(kind, survival), survival, _KIND)

    def worth(self, step: object) -> None:
        """The drafter pays for the step now."""
        own = self._steps.get(step)
        if own is not None:
            own.parked, own.patience = 0, _SOONEST

    def parked(self, step: object) -> bool:
        """The drafter does not pay for the step now: True where it is not to be asked, False every
        so often."""
        own = self._steps.setdefault(step, _Own())
        own.parked += 1
        if own.parked < own.patience:
            return True
        own.parked, own.patience = 0, min(2 * own.patience, _LATEST)
        return False


class _Own:
    """A step's own: its mean, cycles parked since the last try, and cycles until the next."""

    __slots__ = ("mean", "parked", "patience")

    def __init__(self) -> None:
        self.mean: Survival | None = None
        self.parked = 0
        self.patience = _SOONEST


def _moved(mean: Survival, value: Survival, weight: float) -> Survival:
    longest = max(len(mean), len(value))
    padded = ((*each, *(0.0,) * (longest - len(each))) for each in (mean, value))
    return tuple(a + weight * (b - a) for a, b in zip(*padded, strict=True))
