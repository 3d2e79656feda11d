"""Which committed sequence shares the longest beginning with a new one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

from dspark_backend.kv.contiguous import SequenceKV


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading tokens two logs share."""
    shortest = min(len(a), len(b))
    left = np.asarray(a[:shortest], dtype=np.int64)
    right = np.asarray(b[:shortest], dtype=np.int64)
    differing = np.flatnonzero(left != right)
    return int(differing[0]) if differing.size else shortest


class PrefixCache:
    """Sequences of closed sessions, kept for their beginnings, least recently used first out.

    Holds at most ``limit_bytes`` of the engine's KV budget and gives all of it up on demand.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._kept: OrderedDict[tuple[int, ...], SequenceKV] = OrderedDict()

    def keep(self, tokens: Sequence[int], kv: SequenceKV) -> None:
        """Take over ``kv``, whose positions hold ``tokens``; this cache closes it."""
        key = tuple(tokens[: kv.length])
        if not key or key in self._kept:
            kv.close()
            return
        self._kept[key] = kv
        while self._kept and self.held_bytes > self._limit_bytes:
            self.evict()

    def longest(
        self, tokens: Sequence[int], live: Iterable[tuple[Sequence[int], SequenceKV]]
    ) -> tuple[SequenceKV | None, int]:
        """The sequence, kept or live, that shares most with ``tokens``, and how much of its KV.

        Tokens are compared, not hashes: a hit is a fact.
        """
        best: SequenceKV | None = None
        shared = 0
        for log, kv in live:
            length = min(common_prefix(tokens, log), kv.length)
            if length > shared:
                best, shared = kv, length
        hit: tuple[int, ...] | None = None
        for key, kv in self._kept.items():
            length = min(common_prefix(tokens, key), kv.length)
            if length > shared:
                best, shared, hit = kv, length, key
        if hit is not None:
            self._kept.move_to_end(hit)
        return best, shared

    def evict(self) -> bool:
        """Close the least recently used sequence; False when there is none."""
        if not self._kept:
            return False
        _, kv = self._kept.popitem(last=False)
        kv.close()
        return True

    @property
    def held_bytes(self) -> int:
        return sum(kv.held_bytes for kv in self._kept.values())

    def clear(self) -> None:
        while self.evict():
            pass
