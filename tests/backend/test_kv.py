"""Sequence memory: growth, budget, prefixes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_backend.errors import CapacityError
from dspark_backend.kv.budget import KVBudget, KVShape
from dspark_backend.kv.contiguous import ContiguousStorage, SequenceKV
from dspark_backend.kv.pool import SequencePool
from dspark_backend.kv.prefix import PrefixCache, common_prefix
from dspark_backend.kv.retention import returns_in

SHAPE = KVShape(layers=2, kv_heads=1, head_dim=4)
GRAIN_BYTES = SequenceKV.GRAIN * SHAPE.bytes_per_token


def sequence(budget: KVBudget, length: int, fill: float = 1.0) -> SequenceKV:
    kv = SequenceKV(SHAPE, budget)
    kv.reserve(length)
    kv.keys[:, :, :length] = fill
    kv.values[:, :, :length] = -fill
    kv.length = length
    return kv


def test_growth_keeps_what_is_there() -> None:
    kv = sequence(KVBudget(10**9), 200, fill=3.0)
    kv.reserve(5000)
    assert kv.capacity >= 5000
    assert (kv.keys[:, :, :200] == 3.0).all()
    assert (kv.values[:, :, :200] == -3.0).all()


def test_budget_counts_capacity_and_gets_it_back() -> None:
    budget = KVBudget(10**9)
    kv = sequence(budget, 1)
    assert budget.used_bytes == GRAIN_BYTES
    kv.reserve(SequenceKV.GRAIN + 1)
    assert budget.used_bytes == kv.capacity * SHAPE.bytes_per_token
    kv.close()
    kv.close()
    assert budget.used_bytes == 0


def test_a_refused_reservation_changes_nothing() -> None:
    budget = KVBudget(GRAIN_BYTES)
    kv = sequence(budget, 10)
    with pytest.raises(CapacityError, match="KV memory is used up"):
        kv.reserve(SequenceKV.GRAIN + 1)
    assert (kv.capacity, budget.used_bytes) == (SequenceKV.GRAIN, GRAIN_BYTES)


def test_copied_prefix_is_independent() -> None:
    budget = KVBudget(10**9)
    source = sequence(budget, 20, fill=2.0)
    copy = SequenceKV(SHAPE, budget)
    copy.copy_prefix(source, 7)
    source.keys[:] = 0
    assert copy.length == 7
    assert (copy.keys[:, :, :7] == 2.0).all()


def test_misuse_is_refused() -> None:
    budget = KVBudget(10**9)
    kv = sequence(budget, 5)
    with pytest.raises(ValueError, match="truncate"):
        kv.truncate(6)
    with pytest.raises(ValueError, match="empty"):
        kv.copy_prefix(sequence(budget, 3), 3)
    with pytest.raises(ValueError, match="holds 3 positions"):
        SequenceKV(SHAPE, budget).copy_prefix(sequence(budget, 3), 4)


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_common_prefix_is_what_a_loop_finds(a: list[int], b: list[int]) -> None:
    expected = 0
    while expected < min(len(a), len(b)) and a[expected] == b[expected]:
        expected += 1
    assert common_prefix(a, b) == expected


def test_longest_prefix_wins_live_or_kept() -> None:
    budget = KVBudget(10**9)
    cache = PrefixCache(10**9)
    kept = sequence(budget, 3)
    cache.keep([1, 2, 3], kept)
    live = sequence(budget, 4)
    assert cache.longest([1, 2, 3, 9], [([1, 2, 9, 9], live)]) == (kept, 3)
    assert cache.longest([1, 2, 9, 9], [([1, 2, 9, 9], live)]) == (live, 4)
    assert cache.longest([7], [([1], live)]) == (None, 0)


def test_only_computed_positions_are_shared() -> None:
    budget = KVBudget(10**9)
    live = sequence(budget, 2)
    assert PrefixCache(0).longest([1, 2, 3], [([1, 2, 3], live)]) == (live, 2)


def test_kept_sequences_leave_in_order_of_use() -> None:
    budget = KVBudget(10**9)
    cache = PrefixCache(2 * GRAIN_BYTES)
    cache.keep([1, 1], sequence(budget, 2))
    cache.keep([2, 2], sequence(budget, 2))
    cache.longest([1, 1], [])
    cache.keep([3, 3], sequence(budget, 2))
    assert cache.longest([2, 2], [])[1] == 0
    assert cache.longest([1, 1], [])[1] == 2
    cache.clear()
    assert budget.used_bytes == 0


def test_a_beginning_that_is_wanted_often_stays_longer() -> None:
    clock = [0.0]
    cache = PrefixCache(10**9, clock=lambda: clock[0])
    budget = KVBudget(10**9)
    for seed in (1, 2, 3):
        cache.keep([seed, seed], sequence(budget, 2))
    for clock[0], seed in ((1.0, 1), (2.0, 1), (3.0, 1), (6.0, 2)):
        cache.longest([seed, seed], [])
    for clock[0] in (7.0, 8.0, 9.0):  # asked about, which is not wanting it
        assert cache.known([3, 3, 3], []) == 2
    clock[0] = 10.0  # left alone for 7, 4 and 10 seconds; wanted 3, 1 and 0 times
    assert cache.evict(lambda: cache.held_bytes <= 2 * GRAIN_BYTES)
    assert cache.longest([3, 3], []) == (None, 0)
    assert cache.evict(lambda: cache.held_bytes <= GRAIN_BYTES)
    assert cache.longest([2, 2], []) == (None, 0)
    assert cache.held_bytes == GRAIN_BYTES


def test_trimming_gives_back_what_was_only_reserved() -> None:
    budget = KVBudget(10**9)
    kv = SequenceKV(SHAPE, budget, SequenceKV(SHAPE, budget))
    kv.reserve(5 * SequenceKV.GRAIN)
    kv.keys[:, :, :300] = 4.0
    kv.length = 300
    kv.trim()
    assert kv.capacity == 2 * SequenceKV.GRAIN
    assert budget.used_bytes == kv.held_bytes == 2 * GRAIN_BYTES
    assert (kv.keys[:, :, :300] == 4.0).all()


def test_a_reservation_is_generous_only_while_memory_is_plenty() -> None:
    budget = KVBudget(8 * GRAIN_BYTES)
    first = sequence(budget, 2 * SequenceKV.GRAIN)
    first.reserve(2 * SequenceKV.GRAIN + 1)
    assert first.capacity == 4 * SequenceKV.GRAIN
    first.reserve(4 * SequenceKV.GRAIN + 1)
    assert first.capacity == 5 * SequenceKV.GRAIN


def test_a_pool_gives_up_prefixes_then_surplus_then_the_first_of_the_idle() -> None:
    pool = SequencePool(ContiguousStorage(SHAPE, None, 8 * GRAIN_BYTES))

    def held(length: int, reserved: int) -> SequenceKV:
        kv = pool.new()
        kv.reserve(reserved * SequenceKV.GRAIN)
        kv.length = length
        return kv

    pool.retire([1, 2, 3], held(3, 1))
    idle = [held(5, 2), held(6, 1)]
    running = held(9, 3)
    wanted = pool.new()
    grain = SequenceKV.GRAIN
    assert pool.make_room(wanted, grain, idle)
    assert pool.longest([1, 2, 3], [])[1] == 2
    assert pool.make_room(wanted, 2 * grain, idle)
    assert pool.longest([1, 2, 3], [])[1] == 0
    assert [kv.length for kv in (*idle, running)] == [5, 6, 9]
    assert pool.make_room(wanted, 3 * grain, idle)
    assert [kv.capacity for kv in idle] == [grain, grain]
    assert not pool.make_room(wanted, 6 * grain, idle)
    assert [kv.length for kv in idle] == [5, 6]
    assert pool.make_room(wanted, 4 * grain, idle)
    assert [kv.length for kv in (*idle, running)] == [0, 6, 9]
    assert pool.make_room(wanted, 5 * grain, idle, source=idle[1])
    assert [kv.length for kv in (*idle, running)] == [0, 0, 9]


away = st.integers(1, 1000).map(float)


@given(away, away)
def test_a_session_stays_away_as_long_as_it_was_unless_it_said_when(a: float, b: float) -> None:
    assert returns_in(1e6, 1e6 - a) == pytest.approx(a)
    assert (returns_in(1e6, 1e6 - a) < returns_in(1e6, 1e6 - b)) <= (a < b)
    assert returns_in(1e6, 1e6 - a, 1e6 + 5.0) == 5.0
    assert returns_in(1e6, 1e6 - a, 1e6 - b) == pytest.approx(min(a, b))


def test_shape_counts_keys_and_values() -> None:
    assert SHAPE.bytes_per_token == 2 * 2 * 1 * 4 * np.dtype(np.float32).itemsize
