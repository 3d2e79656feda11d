"""What the engine's loop asks of a drafter, whatever it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dspark_backend.kv.budget import KVShape
from dspark_backend.kv.sequence import Positions
from dspark_backend.speculation.distribution import Distribution
from dspark_backend.speculation.guide import Guide


@dataclass(frozen=True, slots=True)
class Anchor:
    """Where a block starts: ``token`` is the first committed one that is not computed yet, at
    position ``context.length``, and ``known`` are the committed ones after it (fewer than a block).

    ``context`` holds the drafter's keys and values of every position before it. Slot k of the chain
    holds the token k places after the anchor: the first ``len(known)`` are given, the rest is
    drafted. ``guide`` decides about those; without one, each is the most likely token.
    """

    context: Positions
    token: int
    known: tuple[int, ...] = ()
    guide: Guide | None = None


@dataclass(frozen=True, slots=True)
class Proposal:
    """Drafted tokens in order (what is known is not among them), and for each the calibrated
    probability that it and all before it will be accepted, given the context (survival, DSPARK.md
    section 1): non-increasing, and survival k does not depend on token k.

    ``source`` names who drafted: metrics count by it. Of a constrained step, ``mask_width`` says
    for each token how many the grammar allowed there (0: all), and ``forced`` whether it is output
    by definition; both are empty where nothing was constrained. ``distributions`` are what the
    tokens were drawn from, None for one that is a function of the context; empty where all are.
    """

    tokens: tuple[int, ...]
    survival: tuple[float, ...]
    source: str
    mask_width: tuple[int, ...] = ()
    forced: tuple[bool, ...] = ()
    distributions: tuple[Distribution | None, ...] = ()

    def first(self, count: int) -> Proposal:
        """The first ``count`` tokens of it."""
        return Proposal(
            self.tokens[:count],
            self.survival[:count],
            self.source,
            self.mask_width[:count],
            self.forced[:count],
            self.distributions[:count],
        )


class Drafter(Protocol):
    """Drafts blocks from the target's features. Used by the engine's thread only.

    Without a guide, drafts are a function of the context (a greedy chain), so any budget keeps the
    output exact (DSPARK.md, section 6).
    """

    @property
    def taps(self) -> tuple[int, ...]:
        """Target layers whose residual stream it reads, ascending."""

    @property
    def block_size(self) -> int:
        """Slots of a block: most tokens that an anchor's known ones and its proposal hold."""

    @property
    def context_shape(self) -> KVShape:
        """What a position of its context takes up."""

    def extend(self, context: Positions, features: Tensor) -> None:
        """Append ``features`` float32 [n, len(taps) * d] of the next n committed positions; room is
        reserved. Sets ``context.length``."""

    def propose(self, anchors: Sequence[Anchor]) -> list[Proposal]:
        """One block for each anchor; contexts are not changed. Each guide is asked once for every
        slot after the known ones, until it ends the block."""
