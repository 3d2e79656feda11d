"""What is kept of closed sessions on a device, against a plain table of beginnings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dspark_backend.kv import page_tree
from dspark_backend.kv.budget import KVShape
from dspark_backend.kv.page_tree import PageTree
from dspark_backend.kv.paged import PagedKV, paged
from dspark_backend.kv.paged_storage import PagedStorage
from dspark_backend.kv.pool import SequencePool

SHAPE = KVShape(layers=1, kv_heads=1, head_dim=1)
SIZE = 4
PAGE_BYTES = SIZE * SHAPE.bytes_per_token
PAGES = 40

Tokens = tuple[int, ...]


def storage(pages: int = PAGES) -> PagedStorage:
    return PagedStorage(
        *(SHAPE, None, pages * PAGE_BYTES, torch.float32, torch.device("cpu"), SIZE)
    )


def sequence(store: PagedStorage, tokens: Sequence[int], source: PagedKV | None = None) -> PagedKV:
    """One that holds ``tokens`` at all positions, those of ``source`` shared with it."""
    kv = store.new()
    if source is not None:
        kv.copy_prefix(source, source.length, len(tokens))
    kv.reserve(len(tokens))
    for position in range(kv.length, len(tokens)):
        store.pool.keys[:, kv.pages[position // SIZE], :, position % SIZE] = tokens[position]
    kv.length = len(tokens)
    return kv


def contents(kv: PagedKV, length: int) -> Tokens:
    keys = kv.pool.keys[0, :, 0, :, 0]
    return tuple(int(keys[kv.pages[t // SIZE], t % SIZE]) for t in range(length))


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


@dataclass
class Entry:
    """A page that is kept: when and how often it was wanted, and who holds it besides."""

    last_used: float
    hits: int
    page: int


class Keeping(RuleBasedStateMachine):
    """The table has every kept page under all tokens up to its end, and is looked through whole."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.store = storage()
        self.limit = 9
        self.tree = PageTree(self.store.new, self.limit * PAGE_BYTES, lambda: self.now)
        self.table: dict[Tokens, Entry] = {}
        self.open: list[PagedKV] = []

    def later(self) -> float:
        self.now += 1.0
        return self.now

    def ends(self) -> list[Tokens]:
        return [
            key
            for key in self.table
            if not any(other[: len(key)] == key and other != key for other in self.table)
        ]

    def last_wanted(self, among: Sequence[Tokens]) -> Tokens:
        def rank(key: Tokens) -> tuple[float, int]:
            entry = self.table[key]
            return (self.now - entry.last_used) / (1 + entry.hits), -entry.page

        return max(among, key=rank)

    def held_elsewhere(self, page: int) -> bool:
        return any(page in kv.pages for kv in self.open)

    def helps(self, key: Tokens) -> bool:
        """Whether memory comes back with this page, or can once it is gone."""
        above = [self.table[key[:end]].page for end in range(SIZE, len(key), SIZE)]
        return any(not self.held_elsewhere(page) for page in (*above, self.table[key].page))

    logs = st.lists(st.integers(0, 1), min_size=1, max_size=18)

    @rule(tokens=logs, stays=st.booleans())
    def kept(self, tokens: list[int], stays: bool) -> None:
        now = self.later()
        if self.store.pool.free < 2 * -(-len(tokens) // SIZE):
            return
        kv = sequence(self.store, tokens)
        pages = list(kv.pages)
        if stays:  # somebody goes on with it
            twin = self.store.new()
            twin.copy_prefix(kv, kv.length)
            self.open.append(twin)
        self.tree.keep(tokens, kv)
        for index, page in enumerate(pages):
            key = tuple(tokens[: (index + 1) * SIZE])
            begun = key[: index * SIZE]
            longer = [
                k
                for k in self.table
                if k[: len(key)] == key and len(begun) < len(k) <= len(begun) + SIZE
            ]
            if longer:
                self.table[min(longer)].last_used = now  # of several, the first in order
                continue
            hits = 0
            for shorter in [key[:end] for end in range(len(begun) + 1, len(key))]:
                if shorter in self.table:
                    hits = self.table.pop(shorter).hits
            self.table[key] = Entry(now, hits, page)
        while len(self.table) > self.limit:
            del self.table[self.last_wanted(self.ends())]

    @rule(tokens=logs)
    def wanted(self, tokens: list[int]) -> None:
        now = self.later()
        source, length = self.tree.longest(tokens, [])
        most = max((shared(tokens, key) for key in self.table), default=0)
        assert length == most
        if source is None:
            assert most == 0
            return
        hit = paged(source)
        assert hit.length == length
        assert contents(hit, length) == tuple(tokens[:length])
        by_page = {entry.page: entry for entry in self.table.values()}
        assert len(hit.pages) == -(-length // SIZE)
        for page in hit.pages:
            by_page[page].hits += 1
            by_page[page].last_used = now

    @rule(tokens=logs)
    def looked_for(self, tokens: list[int]) -> None:
        """As often as one likes: it changes nothing of who leaves first."""
        self.later()
        most = max((shared(tokens, key) for key in self.table), default=0)
        assert self.tree.known(tokens, []) == most

    @rule(count=st.integers(1, 4))
    def evicted(self, count: int) -> None:
        self.later()
        free = self.store.pool.free
        enough = self.tree.evict(lambda: self.store.pool.free >= free + count)
        gone = 0
        while gone < count:
            able = [key for key in self.ends() if self.helps(key)]
            if not able:
                break
            entry = self.table.pop(self.last_wanted(able))
            gone += not self.held_elsewhere(entry.page)
        assert enough == (gone == count)
        assert self.store.pool.free == free + gone

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def closed(self, data: st.DataObject) -> None:
        self.open.pop(data.draw(st.integers(0, len(self.open) - 1))).close()

    @rule()
    def cleared(self) -> None:
        self.tree.clear()
        self.table.clear()

    @invariant()
    def the_tree_keeps_what_the_table_does(self) -> None:
        assert sorted(self.tree.pages) == sorted(entry.page for entry in self.table.values())
        assert self.tree.held_bytes == len(self.table) * PAGE_BYTES

    @invariant()
    def no_page_is_lost_or_free_while_held(self) -> None:
        lent = [] if self.tree._lent is None else [self.tree._lent.pages]
        held = Counter(page for pages in (*lent, self.tree.pages) for page in pages)
        held.update(page for kv in self.open for page in kv.pages)
        assert all(self.store.pool.holders(page) == held[page] for page in range(PAGES))
        assert self.store.pool.free == PAGES - len(held)


TestKeeping = Keeping.TestCase
TestKeeping.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


def test_a_beginning_that_many_had_is_kept_once() -> None:
    store = storage()
    tree = store.prefixes(PAGES * PAGE_BYTES)
    system = list(range(3 * SIZE))
    for seed in range(4):
        tokens = [*system, 50 + seed]
        tree.keep(tokens, sequence(store, tokens))
    assert tree.held_bytes == (3 + 4) * PAGE_BYTES
    assert store.pool.free == PAGES - 7


def test_a_lookup_looks_at_as_many_nodes_as_pages_match(monkeypatch: pytest.MonkeyPatch) -> None:
    store = PagedStorage(*(SHAPE, None, 700 * PAGE_BYTES, torch.float32, torch.device("cpu"), SIZE))
    tree = store.prefixes(700 * PAGE_BYTES)
    for seed in range(300):  # they part within their second page
        tokens = [1, 2, 3, 4, 5, seed, 7]
        tree.keep(tokens, sequence(store, tokens))
    compared = 0
    plainly = page_tree.common_prefix

    def counted(a: Sequence[int], b: Sequence[int]) -> int:
        nonlocal compared
        compared += 1
        return plainly(a, b)

    monkeypatch.setattr(page_tree, "common_prefix", counted)
    for tokens, expected in (([1, 2, 3, 4, 5, 222, 7, 8], 7), ([1, 2, 3, 4, 5, 999], 5)):
        compared = 0
        assert tree.longest(tokens, [])[1] == expected
        assert compared <= 2 * 2


def test_pages_of_a_hit_stay_while_room_is_made_for_who_takes_it_over() -> None:
    store = storage(16)
    pool = SequencePool(store)
    for seed in (1, 2):
        tokens = [seed] * 2 * SIZE
        pool.retire(tokens, sequence(store, tokens))
    source, length = pool.longest([1] * (2 * SIZE + 1), [])
    assert source is not None
    assert length == 2 * SIZE
    kv = store.new()
    # 16 pages less the hit's two: what the other session left has to go.
    assert pool.make_room(kv, 16 * SIZE, (), source, length)
    pool.take_over(kv, source, length, 16 * SIZE)
    assert contents(kv, length) == (1,) * length
    assert store.pool.free == 0
    assert pool.longest([2] * 9, []) == (None, 0)


def test_an_idle_session_that_holds_kept_pages_gives_them_up_with_the_tree() -> None:
    store = storage(8)
    pool = SequencePool(store)
    tokens = [3] * 2 * SIZE
    first = sequence(store, tokens)
    twin = paged(pool.copy(first))
    pool.retire(tokens, first)
    assert pool.make_room(store.new(), 8 * SIZE, [twin])
    assert (twin.length, store.pool.free) == (0, 8)


def test_a_session_without_positions_leaves_nothing() -> None:
    store = storage()
    tree = store.prefixes(PAGES * PAGE_BYTES)
    tree.keep([1, 2], store.new())
    assert (tree.held_bytes, store.pool.free) == (0, PAGES)
    assert tree.longest([1, 2], []) == (None, 0)
