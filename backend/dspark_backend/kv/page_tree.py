"""What closed sessions leave on a device: a radix tree over the tokens of pages.

A node is a page and the tokens in it, its path from the root all tokens before it: what pages hold
depends on those as well. So a beginning that many sequences had is kept once, a lookup looks at as
many nodes as pages match, and memory is given up page by page.
"""

from __future__ import annotations

import heapq
import time
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from dspark_backend.kv.paged import PagedKV, paged
from dspark_backend.kv.prefix import common_prefix, longest_live
from dspark_backend.kv.retention import reuse_in
from dspark_backend.kv.sequence import KV


@dataclass(slots=True, eq=False)
class _Node:
    """``tokens`` are those of ``page``, fewer than a page's only where nothing follows."""

    tokens: tuple[int, ...]
    page: int
    parent: _Node | None
    last_used: float
    hits: int = 0
    children: list[_Node] = field(default_factory=list)  # ascending by tokens

    def closest(self, tokens: tuple[int, ...]) -> tuple[_Node | None, int]:
        """The child that shares most with ``tokens``, and how many of them: in ascending order,
        one of the two between which they would stand."""
        at = bisect_right(self.children, tokens, key=_tokens)
        best: _Node | None = None
        shared = 0
        for child in self.children[max(at - 1, 0) : at + 1]:
            length = common_prefix(tokens, child.tokens)
            if length > shared:
                best, shared = child, length
        return best, shared

    def below(self) -> Iterator[_Node]:
        """All nodes under this one, parents first."""
        waiting = [*self.children]
        while waiting:
            node = waiting.pop()
            yield node
            waiting += node.children


def _tokens(node: _Node) -> tuple[int, ...]:
    return node.tokens


class PageTree:
    """Pages of closed sessions by the tokens in them; what is likely to be wanted last leaves
    first, ends before their beginnings.

    Holds at most ``limit_bytes``, pages that sessions hold as well counted whole. Giving a page up
    never takes it from a sequence that holds it too. ``new`` makes an empty sequence.
    """

    def __init__(
        self,
        new: Callable[[], PagedKV],
        limit_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._new = new
        self._limit_bytes = limit_bytes
        self._clock = clock
        self._pool = new().pool
        self._root = _Node((), -1, None, clock())
        self._count = 0
        # The last hit: it holds its pages, so they stay while somebody may read them.
        self._lent: PagedKV | None = None

    @property
    def held_bytes(self) -> int:
        """Budget held, each page once."""
        return self._count * self._pool.page_bytes

    @property
    def pages(self) -> list[int]:
        """The pages of all nodes."""
        return [node.page for node in self._root.below()]

    def keep(self, tokens: Sequence[int], kv: KV) -> None:
        """As :meth:`Prefixes.keep`: of pages with tokens that are kept already, the older stays."""
        mine, size, now = paged(kv), self._pool.page_size, self._clock()
        self._take_back()
        node = self._root
        for page, start in zip(mine.pages, range(0, mine.length, size), strict=False):
            held = tuple(tokens[start : min(start + size, mine.length)])
            child, shared = node.closest(held)
            if child is None or shared < len(held):
                hits = 0
                if child is not None and shared == len(child.tokens):
                    hits = child.hits
                    self._drop(child)  # the same page, less far computed
                child = self._add(node, held, page, now, hits)
            child.last_used = now
            node = child
        mine.close()
        self._give_up(lambda: self.held_bytes <= self._limit_bytes, self._root.below())

    def longest(
        self, tokens: Sequence[int], live: Iterable[tuple[Sequence[int], KV]]
    ) -> tuple[KV | None, int]:
        """As :meth:`Prefixes.longest`; takes as many steps as pages match, but for ``live``."""
        self._take_back()
        best, shared = longest_live(tokens, live)
        path, length = self._path(tokens)
        if length <= shared:
            return best, shared
        now = self._clock()
        for node in path:
            node.hits += 1
            node.last_used = now
        self._lent = self._new()
        self._lent.adopt([node.page for node in path], length)
        return self._lent, length

    def known(self, tokens: Sequence[int], live: Iterable[tuple[Sequence[int], KV]]) -> int:
        """As :meth:`Prefixes.known`."""
        return max(longest_live(tokens, live)[1], self._path(tokens)[1])

    def evict(self, enough: Callable[[], bool], spare: KV | None = None) -> bool:
        """As :meth:`Prefixes.evict`."""
        if self._lent is not spare:
            self._take_back()
        return self._give_up(enough, self._helping())

    def reclaimable_bytes(self, others: Iterable[KV], spare: KV | None = None) -> int:
        """As :meth:`Prefixes.reclaimable_bytes`."""
        lent = [] if self._lent is None or self._lent is spare else [self._lent]
        sequences = (paged(kv).pages for kv in (*lent, *others))
        return self._pool.reclaimable_bytes([self.pages, *sequences])

    def clear(self) -> None:
        """Give up all pages."""
        self._take_back()
        self._give_up(lambda: self._count == 0, self._root.below())

    def _path(self, tokens: Sequence[int]) -> tuple[list[_Node], int]:
        """The nodes from the root on that share most with ``tokens``, and how many of those."""
        size, node, length = self._pool.page_size, self._root, 0
        path: list[_Node] = []
        while True:
            child, shared = node.closest(tuple(tokens[length : length + size]))
            if child is None:
                return path, length
            path.append(child)
            length += shared
            if shared < size:
                return path, length
            node = child

    def _helping(self) -> Iterator[_Node]:
        """The nodes whose memory, or that of a page before them, comes back where they go."""
        helps = {self._root: False}
        for node in self._root.below():
            assert node.parent is not None
            helps[node] = helps[node.parent] or self._pool.holders(node.page) == 1
            if helps[node]:
                yield node

    def _give_up(self, enough: Callable[[], bool], among: Iterable[_Node]) -> bool:
        """Drop nodes of ``among`` until ``enough()``, ends first. Whether it is enough."""
        if enough():
            return True
        now, chosen = self._clock(), set(among)
        # No two of one rank: nodes are not compared.
        ends = [
            (-reuse_in(now, node.last_used, node.hits), node.page, node)
            for node in chosen
            if not node.children
        ]
        heapq.heapify(ends)
        while ends:
            _, _, node = heapq.heappop(ends)
            parent = node.parent
            self._drop(node)
            if enough():
                return True
            if parent in chosen and not parent.children:
                rank = -reuse_in(now, parent.last_used, parent.hits)
                heapq.heappush(ends, (rank, parent.page, parent))
        return False

    def _add(
        self, parent: _Node, tokens: tuple[int, ...], page: int, now: float, hits: int
    ) -> _Node:
        node = _Node(tokens, page, parent, now, hits)
        insort(parent.children, node, key=_tokens)
        self._pool.share([page])
        self._count += 1
        return node

    def _drop(self, node: _Node) -> None:
        assert node.parent is not None
        siblings = node.parent.children
        del siblings[bisect_left(siblings, node.tokens, key=_tokens)]
        self._pool.release([node.page])
        self._count -= 1

    def _take_back(self) -> None:
        if self._lent is not None:
            self._lent.close()
            self._lent = None
