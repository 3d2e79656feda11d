"""What the engine's loop asks of a drafter, whatever it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dspark_backend.kv.contiguous import KVShape, SequenceKV


@dataclass(frozen=True, slots=True)
class Anchor:
    """Where a block starts: ``token`` is the last committed one, at position ``context.length``.

    ``context`` holds the drafter's keys and values of every position before it.
    """

    context: SequenceKV
    token: int


@dataclass(frozen=True, slots=True)
class Proposal:
    """Drafted tokens in order, and for each the calibrated probability that it and all before it
    will be accepted, given the context (survival, DSPARK.md section 1): non-increasing.

    ``source`` names who drafted: metrics count by it.
    """

    tokens: tuple[int, ...]
    survival: tuple[float, ...]
    source: str


class Drafter(Protocol):
    """Drafts blocks from the target's features. Used by the engine's thread only.

    Drafts are a function of the context (a greedy chain), so any budget keeps the output exact
    (DSPARK.md, section 6).
    """

    @property
    def taps(self) -> tuple[int, ...]:
        """Target layers whose residual stream it reads, ascending."""

    @property
    def block_size(self) -> int:
        """Most tokens that a proposal holds."""

    @property
    def context_shape(self) -> KVShape:
        """What a position of its context takes up."""

    def extend(self, context: SequenceKV, features: NDArray[np.float32]) -> None:
        """Append ``features`` [n, len(taps) * d] of the next n committed positions; room is
        reserved. Sets ``context.length``."""

    def propose(self, anchors: Sequence[Anchor]) -> list[Proposal]:
        """One block for each anchor; contexts are not changed."""
