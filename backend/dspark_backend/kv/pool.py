"""All sequences of an engine: one budget, and the beginnings that are worth keeping."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dspark_backend.errors import CapacityError
from dspark_backend.kv.contiguous import KVBudget, KVShape, SequenceKV
from dspark_backend.kv.prefix import PrefixCache

PREFIX_SHARE = 4
"""Kept prefixes may hold one part in this many of the budget."""


class SequencePool:
    """Makes, fills and retires the sequences of one model (and of its drafter, if it has one).

    Not thread-safe: the engine's lock guards it.
    """

    def __init__(self, shape: KVShape, draft_shape: KVShape | None, limit_bytes: int) -> None:
        self._shape = shape
        self._draft_shape = draft_shape
        self._budget = KVBudget(limit_bytes)
        self._prefixes = PrefixCache(limit_bytes // PREFIX_SHARE)

    @property
    def used_bytes(self) -> int:
        return self._budget.used_bytes

    def new(self) -> SequenceKV:
        """An empty sequence; it holds no memory yet."""
        draft = None
        if self._draft_shape is not None:
            draft = SequenceKV(self._draft_shape, self._budget)
        return SequenceKV(self._shape, self._budget, draft)

    def make_room(
        self,
        kv: SequenceKV,
        length: int,
        idle: Sequence[SequenceKV] = (),
        spare: SequenceKV | None = None,
    ) -> bool:
        """Whether ``kv`` can have ``length`` positions now, giving up for it what it takes, and
        nothing where all of it would not do.

        What goes, in this order, until it fits: kept prefixes, what the ``idle`` sequences of open
        sessions have reserved and not used, then those sequences themselves, the first of ``idle``
        first; at the very end ``spare``, which ``kv`` is to be filled from. Lengths become 0:
        whoever owns such a sequence computes it again.
        """
        if self._fits(kv, length):
            return True
        most = self._prefixes.held_bytes + sum(other.held_bytes for other in idle)
        if not self._budget.fits(kv.capacity_bytes_for(length) - most):
            return False
        while self._prefixes.evict(spare):
            if self._fits(kv, length):
                return True
        for other in idle:
            other.trim()
            if self._fits(kv, length):
                return True
        for other in sorted(idle, key=lambda other: other is spare):
            _empty(other)
            if self._fits(kv, length):
                return True
        self._prefixes.clear()
        return self._fits(kv, length)

    def reserve(self, kv: SequenceKV, length: int) -> None:
        """Room for ``length`` positions, giving up kept prefixes for it. Raises CapacityError."""
        self.make_room(kv, length)
        kv.reserve(length)

    def copy(self, source: SequenceKV) -> SequenceKV:
        """A sequence with the same positions. Raises CapacityError."""
        twin = self.new()
        self.reserve(twin, source.length)
        twin.copy_prefix(source, source.length)
        return twin

    def longest(
        self, tokens: Sequence[int], live: Iterable[tuple[Sequence[int], SequenceKV]]
    ) -> tuple[SequenceKV | None, int]:
        """The kept or live sequence that has most of ``tokens`` already, and how many of them.

        The last token is computed in any case: its logits are what a step goes on from.
        """
        source, shared = self._prefixes.longest(tokens, live)
        shared = min(shared, len(tokens) - 1)
        return (source, shared) if shared > 0 else (None, 0)

    def retire(self, tokens: Sequence[int], kv: SequenceKV) -> None:
        """A session is over: keep the sequence for its beginning while there is room."""
        self._prefixes.keep(tokens, kv)

    def check_fits(self, length: int) -> None:
        """Raises CapacityError when ``length`` positions are more than the whole budget."""
        if not self._fits_alone(length):
            raise CapacityError(
                f"the step needs {length} positions, more than all of kv_bytes "
                f"({self._budget.limit_bytes / 2**20:.0f} MiB) holds; raise kv_bytes"
            )

    def clear(self) -> None:
        """Give up all kept prefixes."""
        self._prefixes.clear()

    def _fits(self, kv: SequenceKV, length: int) -> bool:
        return self._budget.fits(kv.capacity_bytes_for(length))

    def _fits_alone(self, length: int) -> bool:
        return self.new().capacity_bytes_for(length) <= self._budget.limit_bytes


def _empty(kv: SequenceKV) -> None:
    kv.truncate(0)
    kv.trim()
