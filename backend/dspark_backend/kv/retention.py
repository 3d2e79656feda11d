"""When a sequence will be wanted again: a guess, and the whole of what eviction goes by."""

from __future__ import annotations


def returns_in(now: float, idle_since: float, expected_at: float | None = None) -> float:
    """Seconds until a session that is idle since ``idle_since`` takes its next step, all on one
    clock.

    Who said when to expect it is believed until then. Otherwise a session is taken to stay away
    for as long as it has been away already, counted from when it was expected: the longer idle,
    the later it returns (least recently used leaves first).
    """
    if expected_at is not None and expected_at > now:
        return expected_at - now
    return now - (idle_since if expected_at is None else max(idle_since, expected_at))


def reuse_in(now: float, last_used: float, hits: int) -> float:
    """Seconds until the kept beginning of a closed session is wanted again: as long as it has
    been left alone, divided by how often it was wanted so far (being kept counts once)."""
    return (now - last_used) / (1 + hits)
