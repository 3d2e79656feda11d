"""The scheduling policy: bounds, fairness, progress."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dspark_backend.scheduler import Limits, plan

LIMITS = Limits(decode_rows=4, prefill_rows=16, mixed_rows=6)
pending = st.lists(st.integers(1, 40), max_size=12)


def test_decoding_steps_all_take_part() -> None:
    assert plan([1, 3, 4, 2], LIMITS) == [1, 3, 4, 2]


def test_a_lone_prefill_gets_whole_chunks() -> None:
    assert plan([40], LIMITS) == [16]


def test_prefills_beside_a_decode_get_the_smaller_share() -> None:
    assert plan([40, 1, 40], LIMITS) == [6, 1, 0]


def test_prefills_share_a_pass_in_order_of_arrival() -> None:
    assert plan([10, 10, 10], LIMITS) == [10, 6, 0]


@given(pending)
def test_bounds(counts: list[int]) -> None:
    rows = plan(counts, LIMITS)
    assert all(0 <= taken <= count for taken, count in zip(rows, counts, strict=True))
    prefill = [r for r, c in zip(rows, counts, strict=True) if c > LIMITS.decode_rows]
    decoding = len(prefill) < len(counts)
    assert sum(prefill) <= (LIMITS.mixed_rows if decoding else LIMITS.prefill_rows)


@given(pending)
def test_every_pass_moves_the_oldest_prefill_on(counts: list[int]) -> None:
    rows = plan(counts, LIMITS)
    prefills = [i for i, count in enumerate(counts) if count > LIMITS.decode_rows]
    if prefills:
        assert rows[prefills[0]] > 0


@given(pending)
def test_everything_ends(counts: list[int]) -> None:
    left = list(counts)
    for _ in range(sum(counts) + 1):
        rows = plan([c for c in left if c], LIMITS)
        it = iter(rows)
        left = [c - next(it) if c else 0 for c in left]
    assert not any(left)
