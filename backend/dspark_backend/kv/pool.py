"""All sequences of an engine: one budget, and the beginnings that are worth keeping."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dspark_backend.errors import CapacityError
from dspark_backend.kv.sequence import KV, Positions, Storage

PREFIX_SHARE = 4
"""Kept prefixes may hold one part in this many of the budget."""


class SequencePool:
    """Makes, fills and retires the sequences of one model (and of its drafter, if it has one).

    Not thread-safe: the engine's lock guards it.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._budget = storage.budget
        self._prefixes = storage.prefixes(self._budget.limit_bytes // PREFIX_SHARE)

    @property
    def used_bytes(self) -> int:
        return self._budget.used_bytes

    def new(self) -> KV:
        """An empty sequence; it holds no memory yet."""
        return self._storage.new()

    def make_room(
        self,
        kv: Positions,
        length: int,
        idle: Sequence[KV] = (),
        source: KV | None = None,
        shared: int = 0,
    ) -> bool:
        """Whether ``kv`` can have ``length`` positions now, giving up for it what it takes, and
        nothing where all of it would not do.

        What goes, in this order, until it fits: kept prefixes, what the ``idle`` sequences of open
        sessions have reserved and not used, then those sequences themselves, the first of ``idle``
        first; at the very end ``source``, whose first ``shared`` positions ``kv`` is to take over.
        Lengths become 0: whoever owns such a sequence computes it again.
        """

        def fits() -> bool:
            return self._fits(kv, length, source, shared)

        if fits():
            return True
        others = [other for other in idle if other is not source]
        if not self._would_fit(kv, length, others, source, shared) and not self._would_fit(
            kv, length, idle, None, 0
        ):
            return False
        if self._prefixes.evict(fits, source):
            return True
        for other in idle:
            other.trim()
            if fits():
                return True
        for other in sorted(idle, key=lambda other: other is source):
            _empty(other)
            # What is kept may have been held by it as well.
            if fits() or self._prefixes.evict(fits, source):
                return True
        self._prefixes.clear()
        return fits()

    def reserve(self, kv: Positions, length: int) -> None:
        """Room for ``length`` positions, giving up kept prefixes for it. Raises CapacityError."""
        self.make_room(kv, length)
        kv.reserve(length)

    def copy(self, source: KV) -> KV:
        """A sequence with the same positions. Raises CapacityError."""
        twin = self.new()
        self.take_over(twin, source, source.length)
        return twin

    def take_over(self, kv: KV, source: KV, length: int, room: int = 0) -> None:
        """``kv``, which is empty, becomes the first ``length`` positions of ``source`` (as many of
        them as its draft context has too), with room for ``room``. Raises CapacityError."""
        length = min(length, _complete(source))
        self.make_room(kv, max(length, room), (), source, length)
        kv.copy_prefix(source, length, room)

    def longest(
        self, tokens: Sequence[int], live: Iterable[tuple[Sequence[int], KV]]
    ) -> tuple[KV | None, int]:
        """The kept or live sequence that has most of ``tokens`` already, and how many of them.

        The last token is computed in any case: its logits are what a step goes on from.
        """
        source, shared = self._prefixes.longest(tokens, live)
        shared = min(shared, len(tokens) - 1)
        return (source, shared) if shared > 0 else (None, 0)

    def known(self, tokens: Sequence[int], live: Iterable[tuple[Sequence[int], KV]]) -> int:
        """How many tokens :meth:`longest` would find. Nothing follows from asking."""
        return max(0, min(self._prefixes.known(tokens, live), len(tokens) - 1))

    def retire(self, tokens: Sequence[int], kv: KV) -> None:
        """A session is over: keep the sequence for its beginning while there is room."""
        kv.truncate(_complete(kv))  # a hit must find both contexts
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

    def _fits(self, kv: Positions, length: int, source: KV | None, shared: int) -> bool:
        # Making room may have cost the source itself; then there is nothing to take over.
        if source is None or source.length < shared:
            return self._budget.fits(kv.capacity_bytes_for(length))
        return self._budget.fits(kv.capacity_bytes_for(length, source, shared))

    def _would_fit(
        self, kv: Positions, length: int, given_up: Sequence[KV], source: KV | None, shared: int
    ) -> bool:
        """Where all that is kept, but for the source, and ``given_up`` go."""
        needed = kv.capacity_bytes_for(length, source, shared)
        return self._budget.fits(needed - self._prefixes.reclaimable_bytes(given_up, source))

    def _fits_alone(self, length: int) -> bool:
        return self.new().capacity_bytes_for(length) <= self._budget.limit_bytes


def _complete(kv: KV) -> int:
    """Positions that the target's and the draft context both hold: a drafter that failed leaves
    its own behind."""
    return kv.length if kv.draft is None else min(kv.length, kv.draft.length)


def _empty(kv: KV) -> None:
    kv.truncate(0)
    kv.trim()
