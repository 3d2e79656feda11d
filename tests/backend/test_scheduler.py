"""The scheduling policy: bounds, fairness, progress."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dspark_backend.request import Urgency
from dspark_backend.scheduler import Limits, plan, precedence, weight

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


def test_the_urgent_prefill_goes_first_and_the_oldest_still_moves_on() -> None:
    order = [
        precedence(Urgency.BACKGROUND, 1.0, 0),
        precedence(Urgency.INTERACTIVE, 9.0, 1),
        precedence(Urgency.INTERACTIVE, 2.0, 2),
        precedence(Urgency.CRITICAL, float("inf"), 3),
    ]
    assert plan([40, 40, 40, 6], LIMITS, order) == [4, 0, 6, 6]
    assert plan([40, 40, 40, 1], LIMITS, order) == [2, 0, 4, 1]


orders = st.lists(st.tuples(st.integers(1, 40), st.sampled_from(Urgency), st.floats(0, 9)))


@given(orders)
def test_whatever_the_order_bounds_hold_and_everything_ends(
    steps: list[tuple[int, Urgency, float]],
) -> None:
    left = [count for count, _, _ in steps]
    order = [precedence(urgency, due, i) for i, (_, urgency, due) in enumerate(steps)]
    for _ in range(sum(left) + 1):
        there = [i for i, count in enumerate(left) if count]
        rows = plan([left[i] for i in there], LIMITS, [order[i] for i in there])
        prefill = [i for i, _ in zip(there, rows, strict=True) if left[i] > LIMITS.decode_rows]
        most = LIMITS.mixed_rows if len(prefill) < len(there) else LIMITS.prefill_rows
        taken = dict(zip(there, rows, strict=True))
        assert sum(taken[i] for i in prefill) <= most
        assert all(0 <= taken[i] <= left[i] for i in there)
        assert not prefill or taken[prefill[0]] > 0
        for i in there:
            left[i] -= taken[i]
    assert not any(left)


def test_a_token_is_worth_more_the_more_urgent_its_step_is() -> None:
    assert weight(Urgency.INTERACTIVE) == 1.0
    assert weight(Urgency.CRITICAL) > 1.0 > weight(Urgency.BACKGROUND) > 0.0
