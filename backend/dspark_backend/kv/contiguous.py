"""A session's keys and values on the CPU: one contiguous block a layer, grown by doubling."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dspark_backend.kv.budget import KVBudget, KVShape
from dspark_backend.kv.prefix import PrefixCache
from dspark_backend.kv.sequence import Positions


class ContiguousStorage:
    """Sequences in the memory of this process; ``draft`` is the drafter's shape, if there is one.

    ``limit_bytes`` is the grant of keys and values.
    """

    def __init__(self, shape: KVShape, draft: KVShape | None, limit_bytes: int) -> None:
        self.budget = KVBudget(limit_bytes)
        self._shape = shape
        self._draft = draft

    def new(self) -> SequenceKV:
        """An empty sequence; it holds no memory yet."""
        draft = None if self._draft is None else SequenceKV(self._draft, self.budget)
        return SequenceKV(self._shape, self.budget, draft)

    def prefixes(self, limit_bytes: int) -> PrefixCache:
        """As :meth:`Storage.prefixes`."""
        return PrefixCache(limit_bytes)


def contiguous(kv: Positions) -> SequenceKV:
    """``kv`` as what runs on the CPU reads it. Raises TypeError for a sequence that lies elsewhere:
    it belongs to another engine's target."""
    if not isinstance(kv, SequenceKV):
        raise TypeError(f"a sequence on the CPU is a SequenceKV, not {type(kv).__name__}")
    return kv


class SequenceKV:
    """Keys and values of positions ``0 .. length - 1``.

    ``keys`` and ``values`` are float32 ``[layers, kv_heads, capacity, head_dim]``; what lies past
    ``length`` is meaningless and may be overwritten. Views taken of them are valid until the next
    ``reserve``. Not thread-safe: the engine's loop is the only writer.

    ``draft`` is the drafter's context of the same sequence, where there is a drafter: it is
    truncated, copied and closed along with this one, so neither can outlive or outrun the other.
    """

    GRAIN = 256  # positions; capacity is a multiple of it

    def __init__(self, shape: KVShape, budget: KVBudget, draft: SequenceKV | None = None) -> None:
        self.shape = shape
        self.draft = draft
        self.length = 0
        self._budget = budget
        self._closed = False
        self.keys, self.values = self._allocate(0)

    @property
    def capacity(self) -> int:
        return int(self.keys.shape[2])

    @property
    def held_bytes(self) -> int:
        """Budget held, the draft context's included."""
        own = self.capacity * self.shape.bytes_per_token
        return own if self.draft is None else own + self.draft.held_bytes

    def capacity_bytes_for(
        self, length: int, source: SequenceKV | None = None, shared: int = 0
    ) -> int:
        """Bytes of budget that ``reserve(length)`` needs on top of what is held: what is taken over
        from a source is copied, so it changes nothing."""
        return self._bytes_to(length, generous=False)

    def reserve(self, length: int) -> None:
        """Make room for ``length`` positions, and ahead of more to come while memory is plenty.

        Raises CapacityError; nothing changes then.
        """
        generous = self._budget.is_plenty(self._bytes_to(length, generous=True))
        self._budget.take(self._bytes_to(length, generous=generous))
        self._grow(length, generous=generous)

    def trim(self) -> None:
        """Give back what was reserved beyond the positions held."""
        if self.draft is not None:
            self.draft.trim()
        capacity = self._rounded(self.length)
        if capacity < self.capacity:
            self._budget.give_back((self.capacity - capacity) * self.shape.bytes_per_token)
            self._move(capacity)

    def truncate(self, length: int) -> None:
        """Forget positions from ``length`` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate {self.length} positions to {length}")
        self.length = length
        if self.draft is not None:
            self.draft.truncate(min(self.draft.length, length))

    def copy_prefix(self, source: SequenceKV, length: int, room: int = 0) -> None:
        """Become positions ``0 .. length - 1`` of ``source``, with room for ``room`` positions;
        this sequence must be empty."""
        if self.length:
            raise ValueError("only an empty sequence can take over a prefix")
        if length > source.length:
            raise ValueError(f"the source holds {source.length} positions, not {length}")
        self.reserve(max(length, room))
        self.keys[:, :, :length] = source.keys[:, :, :length]
        self.values[:, :, :length] = source.values[:, :, :length]
        self.length = length
        if self.draft is not None:
            if source.draft is None:
                raise ValueError("the source has no draft context to copy")
            self.draft.copy_prefix(source.draft, length)

    def fill(self, value: float) -> None:
        """Write ``value`` to all that there is room for, the draft context included."""
        self.keys.fill(value)
        self.values.fill(value)
        if self.draft is not None:
            self.draft.fill(value)

    def close(self) -> None:
        """Give the memory back. Idempotent."""
        if not self._closed:
            self._closed = True
            self._budget.give_back(self.capacity * self.shape.bytes_per_token)
            self.keys, self.values = self._allocate(0)
            self.length = 0
            if self.draft is not None:
                self.draft.close()

    def _bytes_to(self, length: int, *, generous: bool) -> int:
        more = 0 if self.draft is None else self.draft._bytes_to(length, generous=generous)
        return more + self._growth(length, generous) * self.shape.bytes_per_token

    def _grow(self, length: int, *, generous: bool) -> None:
        if self.draft is not None:
            self.draft._grow(length, generous=generous)
        growth = self._growth(length, generous)
        if growth:
            self._move(self.capacity + growth)

    def _growth(self, length: int, generous: bool) -> int:
        if length <= self.capacity:
            return 0
        return (self._grown(length) if generous else self._rounded(length)) - self.capacity

    def _grown(self, length: int) -> int:
        # Doubling up to 4 Ki positions, then by a quarter: long contexts should not hold twice
        # what they use.
        target = max(length, min(2 * self.capacity, self.capacity + max(4096, self.capacity // 4)))
        return self._rounded(target)

    def _rounded(self, length: int) -> int:
        return -(-length // self.GRAIN) * self.GRAIN

    def _move(self, capacity: int) -> None:
        keys, values = self._allocate(capacity)
        keys[:, :, : self.length] = self.keys[:, :, : self.length]
        values[:, :, : self.length] = self.values[:, :, : self.length]
        self.keys, self.values = keys, values

    def _allocate(self, capacity: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        shape = (self.shape.layers, self.shape.kv_heads, capacity, self.shape.head_dim)
        return np.empty(shape, np.float32), np.empty(shape, np.float32)
