"""When a request that failed for a passing reason is sent again: pure policy, without a clock."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime

from dspark_agent.errors import ModelHTTPError

PASSING = frozenset({408, 409, 429, 500, 502, 503, 504, 529})
"""Status codes of refusals that may be gone a moment later."""


class PassingFailure(Exception):  # noqa: N818 - not an error yet: the request may be sent again
    """A request failed in a way that may pass; ``asked_s`` is how long the server asks to wait."""

    def __init__(self, problem: ModelHTTPError, asked_s: float | None = None) -> None:
        super().__init__(str(problem))
        self.problem = problem
        self.asked_s = asked_s


@dataclass(frozen=True, slots=True)
class Backoff:
    """Pauses that double from ``first_s``, up to ``longest_s`` seconds.

    The second half of each pause is drawn at random, so that clients refused together do not come
    back together. A server that says how long to wait is obeyed, up to ``longest_s``.
    """

    max_retries: int
    longest_s: float
    first_s: float = 0.5
    draw: Callable[[], float] = random.random

    def pause_s(self, failures: int, asked_s: float | None = None) -> float | None:
        """Seconds to wait after the ``failures``-th failure (from 1); None to give up."""
        if failures > self.max_retries:
            return None
        if asked_s is not None:
            return asked_s if asked_s <= self.longest_s else None
        whole = min(self.longest_s, self.first_s * 2.0 ** (failures - 1))
        return whole / 2 + whole / 2 * self.draw()

    def given_up(self, failure: PassingFailure, failures: int) -> ModelHTTPError:
        """The failure as an error that says what was tried."""
        why = f"sent {failures} time(s)"
        if failure.asked_s is not None and failure.asked_s > self.longest_s:
            why += (
                f"; the server asks to wait {failure.asked_s:g} s, max_retry_wait is "
                f"{self.longest_s:g} s"
            )
        found = failure.problem
        return ModelHTTPError(f"{found} ({why})", status_code=found.status_code, body=found.body)


def asked_wait_s(headers: Mapping[str, str], now: datetime) -> float | None:
    """Seconds that a response asks to wait: ``retry-after-ms``, or ``Retry-After`` (RFC 9110,
    section 10.2.3) in seconds or as a date. None where it asks for nothing that can be read."""
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    text = headers.get("retry-after")
    seconds = _number(text)
    if seconds is not None or text is None:
        return seconds
    try:
        date = parsedate_to_datetime(text)
    except ValueError:
        return None
    if date.tzinfo is None:
        return None
    return max(0.0, (date - now).total_seconds())


def _number(text: str | None) -> float | None:
    """A number that is not negative, and finite."""
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if 0 <= number < float("inf") else None
