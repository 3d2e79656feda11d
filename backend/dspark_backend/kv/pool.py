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

    def reserve(self, kv: SequenceKV, length: int) -> None:
        """Room for ``length`` positions, giving up kept prefixes for it. Raises CapacityError."""
        while not self._budget.fits(kv.capacity_bytes_for(length)) and self._prefixes.evict():
            pass
        kv.reserve(length)

    def copy(self, source: SequenceKV) -> SequenceKV:
        """A sequence with the same positions. Raises CapacityError."""
        twin = self.new()
        self.reserve(twin, source.length)
        twin.copy_prefix(source, source.length)
        return twin

    def reuse(
        self,
        kv: SequenceKV,
        tokens: Sequence[int],
        live: Iterable[tuple[Sequence[int], SequenceKV]],
    ) -> None:
        """Fill the empty ``kv`` with what a kept or live sequence has of ``tokens`` already.

        The last token is computed in any case: its logits are what a step goes on from. Raises
        CapacityError.
        """
        source, shared = self._prefixes.longest(tokens, live)
        shared = min(shared, len(tokens) - 1)
        if source is not None and shared > 0:
            self.reserve(kv, shared)
            # Making room may have cost the source itself; then there is nothing to copy.
            if source.length >= shared:
                kv.copy_prefix(source, shared)

    def retire(self, tokens: Sequence[int], kv: SequenceKV) -> None:
        """A session is over: keep the sequence for its beginning while there is room."""
        self._prefixes.keep(tokens, kv)

    def check_fits(self, length: int) -> None:
        """Raises CapacityError when ``length`` positions are more than the whole budget."""
        a_token = self._shape.bytes_per_token
        if self._draft_shape is not None:
            a_token += self._draft_shape.bytes_per_token
        if a_token * length > self._budget.limit_bytes:
            raise CapacityError(
                f"the step needs {length} positions, more than all of kv_bytes "
                f"({self._budget.limit_bytes / 2**20:.0f} MiB) holds; raise kv_bytes"
            )

    def clear(self) -> None:
        """Give up all kept prefixes."""
        self._prefixes.clear()
