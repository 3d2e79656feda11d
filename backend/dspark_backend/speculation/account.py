"""The account of a step's cycles: what was proposed, what was verified of it, and why."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CycleAccount:
    """One pass of the target, as one step saw it.

    ``position`` is the length of the log before it. ``tokens``, ``sources`` and ``survival`` are
    what could have been verified, of which the first ``verified`` were, for ``reason``, and the
    first ``accepted`` stood; ``written`` tokens were committed, those that the target chose and
    the grammar forced included. ``rows`` and ``requests`` are those of the whole pass;
    ``predicted_s`` is None where no cost model foresaw it. All ``*_s`` are of the pass and of the
    drafter's call, which other steps may share.
    """

    position: int
    tokens: tuple[int, ...]
    sources: tuple[str, ...]
    survival: tuple[float, ...]
    verified: int
    reason: str
    accepted: int
    written: int
    rows: int
    requests: int
    draft_s: float
    verify_s: float
    predicted_s: float | None
