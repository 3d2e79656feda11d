"""Which committed sequence shares the longest beginning with a new one, whole sequences kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from dspark_backend.kv.retention import reuse_in
from dspark_backend.kv.sequence import KV

_CHUNK = 64


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading tokens two logs share."""
    shortest = min(len(a), len(b))
    place = 0
    # Most logs differ in their first chunk or in none, and slices of one type compare in C.
    while place < shortest and list(a[place : place + _CHUNK]) == list(b[place : place + _CHUNK]):
        place += _CHUNK
    while place < shortest and a[place] == b[place]:
        place += 1
    return min(place, shortest)


def longest_live(
    tokens: Sequence[int], live: Iterable[tuple[Sequence[int], KV]]
) -> tuple[KV | None, int]:
    """The sequence of ``live``, each with its log, that has most of ``tokens`` computed, and how
    many."""
    best: KV | None = None
    shared = 0
    for log, kv in live:
        if kv.length > shared:
            length = min(common_prefix(tokens, log), kv.length)
            if length > shared:
                best, shared = kv, length
    return best, shared


@dataclass(slots=True)
class _Kept:
    kv: KV
    last_used: float
    hits: int = 0


class PrefixCache:
    """Sequences of closed sessions, kept for their beginnings; who is likely to be wanted last
    leaves first.

    Holds at most ``limit_bytes`` of the engine's KV budget and gives all of it up on demand.
    """

    def __init__(self, limit_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit_bytes = limit_bytes
        self._clock = clock
        self._kept: dict[tuple[int, ...], _Kept] = {}
        self._held_bytes = 0

    def keep(self, tokens: Sequence[int], kv: KV) -> None:
        """Take over ``kv``, whose positions hold ``tokens``; this cache closes it."""
        key = tuple(tokens[: kv.length])
        if key in self._kept:
            self._kept[key].last_used = self._clock()
        if not key or key in self._kept:
            kv.close()
            return
        kv.trim()
        self._kept[key] = _Kept(kv, self._clock())
        self._held_bytes += kv.held_bytes
        self.evict(lambda: self._held_bytes <= self._limit_bytes)

    def longest(
        self, tokens: Sequence[int], live: Iterable[tuple[Sequence[int], KV]]
    ) -> tuple[KV | None, int]:
        """As :meth:`Prefixes.longest`."""
        best, shared = longest_live(tokens, live)
        hit, length = self._longest_kept(tokens, shared)
        if hit is None:
            return best, shared
        hit.hits += 1
        hit.last_used = self._clock()
        return hit.kv, length

    def known(self, tokens: Sequence[int], live: Iterable[tuple[Sequence[int], KV]]) -> int:
        """As :meth:`Prefixes.known`."""
        return self._longest_kept(tokens, longest_live(tokens, live)[1])[1]

    def _longest_kept(self, tokens: Sequence[int], shared: int) -> tuple[_Kept | None, int]:
        """Who has most of ``tokens``, and how many; None where nobody has more than ``shared``."""
        hit: _Kept | None = None
        for key, kept in self._kept.items():
            if kept.kv.length > shared:
                length = min(common_prefix(tokens, key), kept.kv.length)
                if length > shared:
                    shared, hit = length, kept
        return hit, shared

    def evict(self, enough: Callable[[], bool], spare: KV | None = None) -> bool:
        """As :meth:`Prefixes.evict`."""
        while not enough():
            if not self._evict_one(spare):
                return False
        return True

    def _evict_one(self, spare: KV | None) -> bool:
        now = self._clock()
        last = max(
            ((key, kept) for key, kept in self._kept.items() if kept.kv is not spare),
            key=lambda entry: reuse_in(now, entry[1].last_used, entry[1].hits),
            default=None,
        )
        if last is None:
            return False
        key, kept = last
        del self._kept[key]
        self._held_bytes -= kept.kv.held_bytes
        kept.kv.close()
        return True

    def reclaimable_bytes(self, others: Iterable[KV], spare: KV | None = None) -> int:
        """As :meth:`Prefixes.reclaimable_bytes`."""
        kept = (entry.kv for entry in self._kept.values() if entry.kv is not spare)
        return sum(kv.held_bytes for kv in (*kept, *others))

    @property
    def held_bytes(self) -> int:
        """Budget held by the kept sequences."""
        return self._held_bytes

    def clear(self) -> None:
        """Close all of them."""
        self.evict(lambda: not self._kept)
