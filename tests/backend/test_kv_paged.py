"""Pages against a plain model: what every sequence holds, who writes, what memory is left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from dspark_backend.errors import CapacityError
from dspark_backend.kv.budget import KVBudget, KVShape
from dspark_backend.kv.contiguous import SequenceKV
from dspark_backend.kv.page_tree import PageTree
from dspark_backend.kv.paged import PagedKV, paged, paged_context
from dspark_backend.kv.paged_storage import PagedStorage
from dspark_backend.kv.pool import SequencePool

TARGET = KVShape(layers=2, kv_heads=1, head_dim=2)
DRAFT = KVShape(layers=1, kv_heads=1, head_dim=2)
SIZE = 4
PAGE_BYTES = SIZE * (TARGET.bytes_per_token + DRAFT.bytes_per_token)


def storage(pages: int, draft: KVShape | None = DRAFT) -> PagedStorage:
    size = SIZE * (TARGET.bytes_per_token + (draft.bytes_per_token if draft else 0))
    return PagedStorage(TARGET, draft, pages * size, torch.float32, torch.device("cpu"), SIZE)


def value(tokens: Sequence[int], position: int) -> float:
    """What a model would compute at ``position``: a function of all tokens up to it."""
    number = 7
    for token in tokens[: position + 1]:
        number = (number * 31 + token + 1) % 1_000_003
    return float(number)


def write(kv: PagedKV, layers: slice, positions: range, tokens: Sequence[int]) -> None:
    for position in positions:
        page = kv.pages[position // SIZE]
        assert kv.pool.holders(page) == 1, "a page that others hold is written to"
        kv.pool.keys[layers, page, :, position % SIZE] = value(tokens, position)
        kv.pool.values[layers, page, :, position % SIZE] = -value(tokens, position)


def assert_holds(kv: PagedKV, layers: slice, length: int, tokens: Sequence[int]) -> None:
    for position in range(length):
        page, slot = kv.pages[position // SIZE], position % SIZE
        expected = value(tokens, position)
        assert (kv.pool.keys[layers, page, :, slot] == expected).all()
        assert (kv.pool.values[layers, page, :, slot] == -expected).all()


TARGET_LAYERS = slice(0, TARGET.layers)
DRAFT_LAYERS = slice(TARGET.layers, None)


def compute(pool: SequencePool, kv: PagedKV, tokens: Sequence[int]) -> None:
    """A pass over all of ``tokens`` that is not computed: the target's part."""
    pool.reserve(kv, len(tokens))
    write(kv, TARGET_LAYERS, range(kv.length, len(tokens)), tokens)
    kv.length = len(tokens)


def catch_up(kv: PagedKV, tokens: Sequence[int]) -> None:
    """The drafter reads what the target has computed."""
    assert kv.draft is not None
    kv.draft.reserve(kv.length)
    write(kv, DRAFT_LAYERS, range(kv.draft.length, kv.length), tokens)
    kv.draft.length = kv.length


some = st.lists(st.integers(0, 1), min_size=1, max_size=7)


class Paging(RuleBasedStateMachine):
    """Sequences in 14 pages; ``logs`` are the tokens that each open one holds."""

    open = Bundle("open")

    def __init__(self) -> None:
        super().__init__()
        self.storage = storage(14)
        self.pool = SequencePool(self.storage)
        self.logs: dict[PagedKV, list[int]] = {}

    @property
    def tree(self) -> PageTree:
        assert isinstance(self.pool._prefixes, PageTree)
        return self.pool._prefixes

    def idle(self, but: PagedKV) -> list[PagedKV]:
        return [kv for kv in self.logs if kv is not but]

    def forget(self) -> None:
        """Whoever gave its memory up starts again."""
        for kv, log in self.logs.items():
            del log[kv.length :]

    @rule(target=open)
    def opened(self) -> PagedKV:
        kv = paged(self.pool.new())
        self.logs[kv] = []
        return kv

    @rule(kv=open, tokens=some, reads=st.booleans())
    def extended(self, kv: PagedKV, tokens: list[int], reads: bool) -> None:
        before = (kv.length, list(kv.pages), self.logs[kv].copy())
        log = [*self.logs[kv], *tokens]
        try:
            compute(self.pool, kv, log)
        except CapacityError:
            assert (kv.length, kv.pages, self.logs[kv]) == before
            return
        self.logs[kv] = log
        if reads:
            catch_up(kv, log)

    @rule(kv=open, slots=st.integers(1, 5))
    def drafted(self, kv: PagedKV, slots: int) -> None:
        """A block of drafts past the end of its context, which is nobody's context."""
        assert kv.draft is not None
        try:
            catch_up(kv, self.logs[kv])
            self.pool.reserve(kv.draft, kv.draft.length + slots)
        except CapacityError:
            return
        noise = [5] * (kv.draft.length + slots)
        write(kv, DRAFT_LAYERS, range(kv.draft.length, kv.draft.length + slots), noise)

    @rule(kv=open, share=st.floats(0, 1))
    def truncated(self, kv: PagedKV, share: float) -> None:
        length = int(share * kv.length)
        kv.truncate(length)
        del self.logs[kv][length:]

    @rule(kv=open)
    def trimmed(self, kv: PagedKV) -> None:
        kv.trim()
        assert kv.capacity - kv.length < SIZE

    @rule(target=open, kv=open)
    def forked(self, kv: PagedKV) -> PagedKV:
        before = self.storage.budget.used_bytes
        twin = paged(self.pool.copy(kv))
        assert self.storage.budget.used_bytes == before, "a fork takes memory when it is written to"
        self.logs[twin] = self.logs[kv][: twin.length]
        return twin

    @rule(target=open, tokens=some, room=st.integers(0, 20))
    def admitted(self, tokens: list[int], room: int) -> PagedKV:
        """A new session finds its beginning, and room for what it is to write."""
        kv = paged(self.pool.new())
        self.logs[kv] = []
        log = [*max(self.logs.values(), key=len), *tokens]
        live = [(log, other) for other, log in self.logs.items() if other.length]
        source, shared = self.pool.longest(log, live)
        needed = len(log) + room
        lengths = {other: other.length for other in self.logs}
        if not self.pool.make_room(kv, needed, self.idle(kv), source, shared):
            assert {other: other.length for other in self.logs} == lengths
            return kv
        self.forget()
        if source is None or source.length < shared:
            self.pool.reserve(kv, needed)
        else:
            try:
                self.pool.take_over(kv, source, shared, needed)
            except CapacityError:
                assert source.draft is not None
                assert source.draft.length < shared, "there was room for what was promised"
                return kv
        assert kv.capacity >= needed
        self.logs[kv] = log[: kv.length]
        used = self.storage.budget.used_bytes
        compute(self.pool, kv, log)
        catch_up(kv, log)
        assert self.storage.budget.used_bytes == used, "its room was there already"
        self.logs[kv] = log
        return kv

    @rule(kv=consumes(open), keeps=st.booleans())
    def closed(self, kv: PagedKV, keeps: bool) -> None:
        log = self.logs.pop(kv)
        if keeps:
            self.pool.retire(log, kv)
        else:
            kv.close()

    @rule()
    def cleared(self) -> None:
        self.pool.clear()

    @invariant()
    def contents_are_what_was_computed(self) -> None:
        for kv, log in self.logs.items():
            assert kv.draft is not None
            assert kv.draft.length <= kv.length <= kv.capacity
            assert_holds(kv, TARGET_LAYERS, kv.length, log)
            assert_holds(kv, DRAFT_LAYERS, kv.draft.length, log)
        for node in self.tree._root.below():
            tokens = node.tokens
            above = node.parent
            while above is not None:
                tokens, above = above.tokens + tokens, above.parent
            start = len(tokens) - len(node.tokens)
            assert start % SIZE == 0
            for position in range(start, len(tokens)):  # of the drafter's layers as well
                expected = value(tokens, position)
                keys = self.storage.pool.keys[:, node.page, :, position % SIZE]
                assert (keys == expected).all()

    @invariant()
    def every_page_is_accounted_for(self) -> None:
        lent = [] if self.tree._lent is None else self.tree._lent.pages
        kept = self.tree.pages
        assert set(lent) <= set(kept)
        assert len(set(kept)) == len(kept) == self.tree.held_bytes // PAGE_BYTES <= 14 // 4
        holders = Counter([*kept, *lent])
        holders.update(page for kv in self.logs for page in kv.pages)
        pages = self.storage.pool
        assert all(pages.holders(page) == count for page, count in holders.items())
        assert pages.free + len(holders) == 14
        assert self.storage.budget.used_bytes == len(holders) * PAGE_BYTES
        assert self.tree.reclaimable_bytes(self.logs) == len(holders) * PAGE_BYTES

    def teardown(self) -> None:
        for kv in self.logs:
            kv.close()
        self.pool.clear()
        assert self.storage.pool.free == 14
        assert self.storage.budget.used_bytes == 0


TestPaging = Paging.TestCase
TestPaging.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def filled(store: PagedStorage, tokens: Sequence[int]) -> PagedKV:
    kv = store.new()
    compute(SequencePool(store), kv, tokens)
    if kv.draft is not None:
        catch_up(kv, tokens)
    return kv


def test_a_twin_that_writes_leaves_the_other_as_it_was() -> None:
    store = storage(8)
    first = filled(store, range(6))
    twin = store.new()
    twin.copy_prefix(first, 6)
    assert twin.pages == first.pages
    compute(SequencePool(store), twin, [*range(6), 9])
    assert twin.pages[0] == first.pages[0]
    assert twin.pages[1] != first.pages[1]
    assert_holds(first, slice(None), 6, range(6))
    assert_holds(twin, TARGET_LAYERS, 7, [*range(6), 9])


def test_going_back_into_a_shared_page_copies_it() -> None:
    store = storage(8)
    first = filled(store, range(10))
    twin = store.new()
    twin.copy_prefix(first, 10)
    twin.truncate(3)
    assert twin.capacity_bytes_for(9) == 3 * PAGE_BYTES
    compute(SequencePool(store), twin, [0, 1, 2, 8, 8, 8, 8, 8, 8])
    assert set(twin.pages).isdisjoint(first.pages)
    assert_holds(first, slice(None), 10, range(10))


def test_room_for_a_copy_is_part_of_what_is_asked_for() -> None:
    store = storage(3)
    first = filled(store, range(6))
    twin = store.new()
    twin.copy_prefix(first, 6)
    third = store.new()
    third.reserve(1)
    assert not store.budget.fits(twin.capacity_bytes_for(7))
    with pytest.raises(CapacityError, match="KV memory is used up"):
        twin.reserve(7)
    assert twin.pages == first.pages
    first.close()  # then the page is the twin's alone
    assert twin.capacity_bytes_for(7) == 0


def test_what_others_hold_is_no_memory_to_be_had() -> None:
    store = storage(8)
    first = filled(store, range(8))
    twin = store.new()
    twin.copy_prefix(first, 8)
    own = filled(store, range(4))
    tree = store.prefixes(0)
    assert tree.reclaimable_bytes([first]) == 0
    assert tree.reclaimable_bytes([first, own]) == PAGE_BYTES
    assert tree.reclaimable_bytes([first, twin, own]) == 3 * PAGE_BYTES


def test_nothing_is_given_up_where_shared_pages_would_keep_it_from_helping() -> None:
    store = storage(4)
    pool = SequencePool(store)
    running = filled(store, range(8))
    idle = paged(pool.copy(running))
    assert idle.held_bytes == 2 * PAGE_BYTES
    assert not pool.make_room(store.new(), 3 * SIZE, [idle])
    assert idle.length == 8
    assert pool.make_room(store.new(), 2 * SIZE, [idle])


def test_a_prefix_of_a_context_that_lags_is_cut_to_what_both_hold() -> None:
    store = storage(8)
    pool = SequencePool(store)
    source = filled(store, range(5))
    compute(pool, source, range(11))
    taken = store.new()
    pool.take_over(taken, source, 11, 12)
    assert taken.draft is not None
    assert (taken.length, taken.draft.length) == (5, 5)
    with pytest.raises(ValueError, match="draft context holds 5 positions, not 9"):
        store.new().copy_prefix(source, 9)


def test_misuse_is_refused() -> None:
    store = storage(8)
    kv = filled(store, range(5))
    with pytest.raises(ValueError, match="truncate"):
        kv.truncate(6)
    with pytest.raises(ValueError, match="empty"):
        kv.copy_prefix(filled(store, range(3)), 3)
    with pytest.raises(ValueError, match="holds 3 positions"):
        store.new().copy_prefix(filled(store, range(3)), 4)
    with pytest.raises(TypeError, match="PagedKV, not SequenceKV"):
        paged(SequenceKV(TARGET, KVBudget(2**20)))
    with pytest.raises(TypeError, match="PagedContext, not PagedKV"):
        paged_context(kv)
    wide = KVShape(layers=1, kv_heads=2, head_dim=2)
    with pytest.raises(ValueError, match="does not fit into the pages"):
        storage(8, wide)


def test_a_target_alone_has_no_context() -> None:
    store = storage(3, None)
    kv = filled(store, range(9))
    assert kv.draft is None
    assert store.pool.keys.shape == (2, 3 + 1, 1, SIZE, 2)  # and one to write padding to
    kv.close()
    assert store.budget.used_bytes == 0
