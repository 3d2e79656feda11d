"""A session's keys and values on the CPU: one contiguous block a layer, grown by doubling."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dspark_backend.errors import CapacityError


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one position of a sequence takes up: float32 keys and values of every layer."""

    layers: int
    kv_heads: int
    head_dim: int

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * 4


class KVBudget:
    """The memory granted to all sequences of an engine, counted by capacity held."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0

    def fits(self, more_bytes: int) -> bool:
        return self.used_bytes + more_bytes <= self.limit_bytes

    def is_plenty(self, more_bytes: int) -> bool:
        """Whether half of the grant is still free after ``more_bytes``."""
        return self.used_bytes + more_bytes <= self.limit_bytes // 2

    def take(self, more_bytes: int) -> None:
        """Raises CapacityError when the grant is used up; nothing is taken then."""
        if not self.fits(more_bytes):
            raise CapacityError(
                f"the KV memory is used up: {self.used_bytes / 2**20:.0f} of "
                f"{self.limit_bytes / 2**20:.0f} MiB held, {more_bytes / 2**20:.0f} MiB more "
                "needed; close sessions, or load the engine with a larger kv_bytes"
            )
        self.used_bytes += more_bytes

    def give_back(self, count_bytes: int) -> None:
        self.used_bytes -= count_bytes


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

    def capacity_bytes_for(self, length: int) -> int:
        """Bytes of budget that ``reserve(length)`` needs on top of what is held."""
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

    def copy_prefix(self, source: SequenceKV, length: int) -> None:
        """Become positions ``0 .. length - 1`` of ``source``; this sequence must be empty."""
        if self.length:
            raise ValueError("only an empty sequence can take over a prefix")
        if length > source.length:
            raise ValueError(f"the source holds {source.length} positions, not {length}")
        self.reserve(length)
        self.keys[:, :, :length] = source.keys[:, :, :length]
        self.values[:, :, :length] = source.values[:, :, :length]
        self.length = length
        if self.draft is not None:
            if source.draft is None:
                raise ValueError("the source has no draft context to copy")
            self.draft.copy_prefix(source.draft, length)

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
