"""How often a copied token is what the target writes: measured before, adapted as it goes on."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np

from dspark_backend.errors import RequestError
from dspark_backend.request import StepKind

LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64)
"""Where the buckets of matched tokens begin."""


class Agreement(IntEnum):
    """What part of the occurrences said this token, and how many they were."""

    ONE = 0  # there is no other occurrence
    FEW = 1  # 2 or 3 of 2 or 3
    ALL = 2  # all, 4 or more
    HALF = 3
    QUARTER = 4
    LESS = 5

    @classmethod
    def of(cls, votes: int, voters: int) -> Agreement:
        """``votes`` of ``voters`` occurrences agree, at least one of them."""
        if votes == voters:
            return cls.ONE if voters == 1 else cls.FEW if voters < 4 else cls.ALL
        if 2 * votes >= voters:
            return cls.HALF
        return cls.QUARTER if 4 * votes >= voters else cls.LESS


# [matched tokens][agreement]: `python -m dspark_backend.training.copy_prior` measured it on this
# project's own history.
PRIOR = (
    (0.264, 0.518, 0.796, 0.255, 0.149, 0.066),
    (0.438, 0.673, 0.810, 0.323, 0.201, 0.117),
    (0.523, 0.753, 0.910, 0.302, 0.188, 0.100),
    (0.663, 0.833, 0.944, 0.362, 0.199, 0.079),
    (0.749, 0.869, 0.957, 0.423, 0.214, 0.072),
    (0.801, 0.885, 0.949, 0.396, 0.188, 0.075),
    (0.864, 0.909, 0.983, 0.446, 0.235, 0.063),
    (0.936, 0.918, 0.988, 0.441, 0.220, 0.046),
    (0.980, 0.922, 0.989, 0.401, 0.220, 0.046),
    (0.998, 0.922, 0.989, 0.401, 0.220, 0.046),
)

PRIOR_WEIGHT = 16.0  # observations that the prior counts for
MEMORY = 256.0  # observations of a cell after which an older one has lost 63 % of its weight

Cell = tuple[int, int, int]

_BUCKETS = tuple(
    int(np.searchsorted(LENGTHS, length, side="right")) - 1 for length in range(LENGTHS[-1] + 1)
)


def cell(matched: int, votes: int, voters: int, *, foreign: bool) -> Cell:
    """Where a copied token is counted.

    ``matched`` is how many tokens before it agree with the source, those that this copy drafted
    itself included, at least 1: the length of the match where the copy began and how far it came
    since tell no more apart than their sum does. ``foreign`` for a source in another session.
    """
    return int(foreign), _BUCKETS[min(matched, LENGTHS[-1])], Agreement.of(votes, voters)


class CopyAcceptance:
    """The probability that a copied token is accepted, given that all before it were.

    For each step kind and cell the mean of a Beta distribution: the prior's and what was observed,
    with exponential forgetting. A table of fixed size for each kind. Not thread-safe.
    """

    def __init__(self, prior: Sequence[Sequence[float]] = PRIOR) -> None:
        """``prior`` is laid out as ``PRIOR``. Raises RequestError where it is not, or holds
        something else than probabilities."""
        table = np.array(prior, np.float64)
        if table.shape != (len(LENGTHS), len(Agreement)) or not ((table >= 0) & (table <= 1)).all():
            raise RequestError(
                f"a copy prior holds probabilities, {len(LENGTHS)} lengths by {len(Agreement)} "
                f"agreements: this one is {table.shape} with values {table.min()} to {table.max()}"
            )
        shape = (2, *table.shape)
        self._prior = table
        self._seen = {kind: np.zeros((*shape, 2)) for kind in StepKind}  # accepted, observed
        self._mean = {kind: np.broadcast_to(table, shape).tolist() for kind in StepKind}

    def probability(self, kind: StepKind, at: Cell) -> float:
        source, length, agreement = at
        mean: float = self._mean[kind][source][length][agreement]
        return mean

    def observe(self, kind: StepKind, at: Cell, accepted: bool) -> None:
        """A copied token was verified, and all before it had been accepted."""
        source, length, agreement = at
        seen = self._seen[kind][at]
        seen *= 1.0 - 1.0 / MEMORY
        seen += (accepted, 1.0)
        hits, count = seen.tolist()
        self._mean[kind][source][length][agreement] = (
            PRIOR_WEIGHT * float(self._prior[length, agreement]) + hits
        ) / (PRIOR_WEIGHT + count)
