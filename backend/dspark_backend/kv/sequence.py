"""What the engine asks of a sequence's keys and values, wherever they lie."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, Self

from dspark_backend.kv.budget import KVBudget


class Positions(Protocol):
    """Keys and values of positions ``0 .. length - 1``, and room for ``capacity`` of them.

    What lies past ``length`` is meaningless and may be overwritten. The engine's loop sets
    ``length``: it commits what a pass has written. Not thread-safe.
    """

    length: int

    @property
    def capacity(self) -> int:
        """Positions that there is room for."""

    def capacity_bytes_for(self, length: int, source: Self | None = None, shared: int = 0) -> int:
        """Bytes of budget that room for ``length`` positions needs on top of what is held, the
        first ``shared`` of them taken over from ``source``."""

    def reserve(self, length: int) -> None:
        """Make room for ``length`` positions that may be written from here on.

        Raises CapacityError; nothing changes then.
        """


class KV(Positions, Protocol):
    """A session's keys and values.

    ``draft`` is the drafter's context of the same sequence, where there is a drafter: it is
    truncated, copied and closed along with it, so neither can outlive or outrun the other.
    """

    @property
    def draft(self) -> Positions | None: ...

    @property
    def held_bytes(self) -> int:
        """Budget held, the draft context's included; what others share counts whole."""

    def trim(self) -> None:
        """Give back what was reserved beyond the positions held."""

    def truncate(self, length: int) -> None:
        """Forget positions from ``length`` on. Raises ValueError where there are fewer."""

    def copy_prefix(self, source: Self, length: int, room: int = 0) -> None:
        """Become positions ``0 .. length - 1`` of ``source``, with room for ``room`` positions;
        this sequence must be empty.

        Raises CapacityError, and nothing changes then; ValueError where this sequence is not empty
        or the source, or its draft context, holds fewer positions.
        """

    def fill(self, value: float) -> None:
        """Write ``value`` to all that there is room for, the draft context included."""

    def close(self) -> None:
        """Give the memory back. Idempotent."""


class Prefixes(Protocol):
    """What closed sessions leave for sessions that begin as they did, under a limit of its own
    within the engine's budget, and given up on demand. Not thread-safe."""

    @property
    def held_bytes(self) -> int:
        """Budget held."""

    def keep(self, tokens: Sequence[int], kv: KV) -> None:
        """Take over ``kv``, whose positions, the draft context's as well, hold ``tokens``: nobody
        else uses or closes it from here on."""

    def longest(
        self, tokens: Sequence[int], live: Iterable[tuple[Sequence[int], KV]]
    ) -> tuple[KV | None, int]:
        """The sequence, kept or ``live`` (each with its log), that shares most with ``tokens``, and
        how much of its KV; (None, 0) where none does.

        Tokens are compared, not hashes: a hit is a fact. A kept one is to be read only, until the
        next call of any method that is not given it as ``spare``; its length becomes 0 where it is
        given up.
        """

    def known(self, tokens: Sequence[int], live: Iterable[tuple[Sequence[int], KV]]) -> int:
        """How much :meth:`longest` would find. Nothing follows from asking."""

    def evict(self, enough: Callable[[], bool], spare: KV | None = None) -> bool:
        """Give up what is wanted last, then what is next, until ``enough()`` or until nothing is
        left whose memory would come back; ``spare`` excepted. Whether it is enough."""

    def reclaimable_bytes(self, others: Iterable[KV], spare: KV | None = None) -> int:
        """Budget that comes back where all that is kept, ``spare`` excepted, and all of ``others``
        are closed."""

    def clear(self) -> None:
        """Give up everything."""


class Storage(Protocol):
    """Where the sequences of an engine lie, under one budget."""

    @property
    def budget(self) -> KVBudget: ...

    def new(self) -> KV:
        """An empty sequence; it holds no memory yet."""

    def prefixes(self, limit_bytes: int) -> Prefixes:
        """What keeps the beginnings of its sequences, at most ``limit_bytes`` of them."""
