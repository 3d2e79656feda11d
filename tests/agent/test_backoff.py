"""When a refused request is sent again: the policy alone."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_agent import ModelHTTPError
from dspark_agent.models.backoff import Backoff, PassingFailure, asked_wait_s

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)


@given(st.integers(1, 40), st.floats(0, 1, exclude_max=True), st.floats(0.1, 60))
def test_pauses_double_up_to_the_longest(failures: int, drawn: float, longest: float) -> None:
    backoff = Backoff(40, longest, draw=lambda: drawn)
    whole = min(longest, 0.5 * 2 ** (failures - 1))
    pause = backoff.pause_s(failures)
    assert pause is not None
    assert whole / 2 <= pause <= whole


def test_it_gives_up_after_the_retries() -> None:
    backoff = Backoff(2, 30.0)
    assert backoff.pause_s(2) is not None
    assert backoff.pause_s(3) is None
    assert backoff.pause_s(3, asked_s=0.0) is None
    assert Backoff(0, 30.0).pause_s(1) is None


def test_the_server_is_obeyed_up_to_the_longest_pause() -> None:
    backoff = Backoff(2, 30.0)
    assert backoff.pause_s(1, asked_s=30.0) == 30.0
    assert backoff.pause_s(1, asked_s=0.0) == 0.0
    assert backoff.pause_s(1, asked_s=30.1) is None


def test_giving_up_says_what_was_tried() -> None:
    failure = PassingFailure(ModelHTTPError("busy", status_code=429, body="{}"), 90.0)
    error = Backoff(2, 30.0).given_up(failure, 1)
    assert str(error) == (
        "busy (sent 1 time(s); the server asks to wait 90 s, max_retry_wait is 30 s)"
    )
    assert (error.status_code, error.body) == (429, "{}")


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after-ms": "250", "retry-after": "3"}, 0.25),
        ({"retry-after": format_datetime(NOW + timedelta(seconds=7), usegmt=True)}, 7.0),
        ({"retry-after": format_datetime(NOW - timedelta(seconds=7), usegmt=True)}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
    ],
)
def test_how_long_a_response_asks_to_wait(headers: dict[str, str], seconds: float | None) -> None:
    assert asked_wait_s(headers, NOW) == seconds
