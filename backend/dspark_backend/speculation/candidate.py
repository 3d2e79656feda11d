"""What a budget policy decides on: values of one pass, no tensors, no model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from dspark_backend.errors import BackendError


class BudgetError(BackendError):
    """A candidate, a policy or a cost that no budget can be decided with."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One request of the coming pass and the tokens proposed for it.

    ``survival[k]`` is the calibrated probability that proposed tokens 0..k are all accepted,
    given the context: non-increasing. ``base_rows`` are the committed tokens that the pass
    computes in any case (the anchor included), ``context`` the positions that they attend to.
    ``weight`` is what a token of this request is worth beside one of another. At most ``cap``
    proposed tokens may be verified: a step boundary, a terminal grammar state, max_new_tokens.

    The first ``free`` proposed tokens are certain, since the grammar forces them: their survival is
    1, they cost a row each and are always admitted (``cap`` permitting), and they count as nobody's
    gain, since plain decoding takes them in the same pass. ``drafted``: the proposal came out of
    the drafter's call, whose time is part of the cycle; a copy or a forced span did not.

    Raises BudgetError for values out of range.
    """

    survival: tuple[float, ...]
    base_rows: int = 1
    context: int = 0
    weight: float = 1.0
    cap: int | None = None
    free: int = 0
    drafted: bool = True

    def __post_init__(self) -> None:
        before = 1.0
        for k, value in enumerate(self.survival):
            if not 0.0 <= value <= before:
                raise BudgetError(
                    f"survivals lie in [0, 1] and never rise: {value} after {before}, token {k}"
                )
            before = value
        if self.base_rows < 1 or self.context < 0:
            raise BudgetError(
                "a request computes at least one row over a context of at least 0 positions, "
                f"not {self.base_rows} over {self.context}"
            )
        if not (self.weight > 0.0 and math.isfinite(self.weight)):
            raise BudgetError(f"a weight is positive and finite, not {self.weight}")
        if self.cap is not None and self.cap < 0:
            raise BudgetError(f"a cap is at least 0, not {self.cap}")
        if not 0 <= self.free <= len(self.survival):
            raise BudgetError(f"{self.free} of {len(self.survival)} proposed tokens cannot be free")
        if self.free and self.survival[self.free - 1] != 1.0:
            raise BudgetError(
                f"free tokens are certain, but token {self.free - 1} has survival "
                f"{self.survival[self.free - 1]}: only forced tokens are free"
            )

    @property
    def most(self) -> int:
        """Proposed tokens that may be verified."""
        proposed = len(self.survival)
        return proposed if self.cap is None else min(proposed, self.cap)

    @property
    def certain(self) -> int:
        """Proposed tokens that are verified in any case."""
        return min(self.free, self.most)


class CycleCost(Protocol):
    """Seconds of the two parts of a cycle, on this machine."""

    def verify_s(self, rows: int, requests: int, context: int) -> float:
        """One target pass over ``rows`` rows of ``requests`` sequences that attend to ``context``
        positions in all."""

    def draft_s(self, anchors: int) -> float:
        """One call of the drafter for that many anchors; 0.0 for none."""


class BudgetPolicy(Protocol):
    """Decides how much of every proposal the next pass verifies."""

    @property
    def parks(self) -> bool:
        """Whether the engine asks the drafter only where its call is expected to pay for itself
        (``parking.py``), and decodes plainly otherwise; without, it is asked in every cycle."""

    def lengths(self, candidates: Sequence[Candidate], cost: CycleCost) -> list[int]:
        """Proposed tokens to verify, one number a candidate, within [certain, most]."""
