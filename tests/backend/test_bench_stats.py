"""Order statistics of the reports."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_backend.bench.stats import median, percentile, ratio

SECONDS = st.lists(st.floats(0, 1e6), min_size=1, max_size=50)


@given(SECONDS)
def test_median_is_the_textbook_one(values: list[float]) -> None:
    assert median(values) == pytest.approx(statistics.median(values))


def test_median_leaves_out_what_is_missing() -> None:
    assert median([None, 3.0, 1.0, None, 2.0]) == 2.0
    assert median([None]) is None


@given(SECONDS, st.floats(0.01, 1.0))
def test_percentile_is_the_smallest_value_that_covers_the_share(
    values: list[float], share: float
) -> None:
    found = percentile(values, share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values) - 1e-9
    below = [value for value in values if value < found]
    assert len(below) < share * len(values) + 1e-9


@pytest.mark.parametrize("share", [0.0, 1.01, -1.0])
def test_percentile_refuses_a_share_that_is_none(share: float) -> None:
    with pytest.raises(ValueError, match="share"):
        percentile([1.0], share)


def test_ratio_of_the_missing_is_missing() -> None:
    assert ratio(3.0, 2.0) == 1.5
    assert ratio(None, 2.0) is None
    assert ratio(3.0, None) is None
    assert ratio(3.0, 0.0) is None
