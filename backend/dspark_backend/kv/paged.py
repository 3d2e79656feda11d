"""A session's keys and values on a device: pages, shared with others until somebody writes.

The drafter's context lies in the same pages, in layers of its own: whoever shares a page of the
target's keys and values shares the drafter's of the same positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dspark_backend.kv.pages import PagePool
from dspark_backend.kv.sequence import Positions


def paged(kv: Positions) -> PagedKV:
    """``kv`` as what runs on a device reads it. Raises TypeError for a sequence that lies
    elsewhere: it belongs to another engine's target."""
    if not isinstance(kv, PagedKV):
        raise TypeError(f"a sequence on a device is a PagedKV, not {type(kv).__name__}")
    return kv


class PagedKV:
    """Position t is slot ``t % S`` of page ``pages[t // S]`` of ``pool``.

    Pages of positions that are computed may be shared. Those of positions that ``reserve`` made
    room for are this sequence's alone: a page that is about to be written and has other holders is
    copied first. So the memory for the copy is counted where the room is asked for.
    """

    def __init__(self, pool: PagePool, *, drafts: bool) -> None:
        self.pool = pool
        self.length = 0
        self.pages: list[int] = []
        self.draft = PagedContext(self) if drafts else None

    @property
    def capacity(self) -> int:
        return len(self.pages) * self.pool.page_size

    @property
    def held_bytes(self) -> int:
        return len(self.pages) * self.pool.page_bytes

    def capacity_bytes_for(
        self, length: int, source: Positions | None = None, shared: int = 0
    ) -> int:
        size = self.pool.page_size
        if source is None:
            return self._needed(length) * self.pool.page_bytes
        # Whole pages are shared. What is written of the last one is written in a copy.
        kept = shared // size if length > shared else -(-shared // size)
        own = len(self.pages)  # an empty sequence's: they go before
        return max(0, -(-length // size) - kept - own) * self.pool.page_bytes

    def reserve(self, length: int) -> None:
        needed = self._needed(length)
        if not needed:
            return
        shared = self._shared(length)
        fresh = self.pool.take(needed)
        old = [self.pages[index] for index in shared]
        self.pool.copy(old, fresh[: len(old)])
        for index, page in zip(shared, fresh, strict=False):
            self.pages[index] = page
        self.pool.release(old)
        self.pages.extend(fresh[len(old) :])

    def trim(self) -> None:
        kept = -(-self.length // self.pool.page_size)
        self.pool.release(self.pages[kept:])
        del self.pages[kept:]

    def truncate(self, length: int) -> None:
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate {self.length} positions to {length}")
        self.length = length
        if self.draft is not None:
            self.draft.length = min(self.draft.length, length)

    def copy_prefix(self, source: PagedKV, length: int, room: int = 0) -> None:
        if self.length:
            raise ValueError("only an empty sequence can take over a prefix")
        if length > source.length:
            raise ValueError(f"the source holds {source.length} positions, not {length}")
        if self.draft is not None and (source.draft is None or source.draft.length < length):
            held = 0 if source.draft is None else source.draft.length
            raise ValueError(f"the source's draft context holds {held} positions, not {length}")
        self.adopt(source.pages[: -(-length // self.pool.page_size)], length)
        try:
            self.reserve(max(length, room))
        except BaseException:
            self.close()
            raise

    def adopt(self, pages: Sequence[int], length: int) -> None:
        """Become another holder of ``pages``, whose first ``length`` positions are computed, the
        drafter's as well; this sequence must be empty."""
        self.trim()  # what was reserved for other contents
        self.pages = list(pages)
        self.pool.share(self.pages)
        self._hold(length)

    def fill(self, value: float) -> None:
        pages = torch.tensor(self.pages, device=self.pool.keys.device)
        self.pool.keys[:, pages] = value
        self.pool.values[:, pages] = value

    def close(self) -> None:
        self._hold(0)
        self.trim()

    def _hold(self, length: int) -> None:
        self.length = length
        if self.draft is not None:
            self.draft.length = length

    @property
    def _written(self) -> int:
        """Positions that are not written any more."""
        return self.length if self.draft is None else min(self.length, self.draft.length)

    def _shared(self, length: int) -> range | list[int]:
        """Which of the pages that room for ``length`` positions writes to have other holders."""
        size, first = self.pool.page_size, self._written
        if length <= first:
            return []
        last = min(len(self.pages), -(-length // size))
        return [i for i in range(first // size, last) if self.pool.holders(self.pages[i]) > 1]

    def _needed(self, length: int) -> int:
        """Pages to take for room for ``length`` positions."""
        missing = -(-length // self.pool.page_size) - len(self.pages)
        return max(0, missing) + len(self._shared(length))


class PagedContext:
    """A drafter's context in the pages of its sequence: a length of its own, and no memory."""

    def __init__(self, owner: PagedKV) -> None:
        self.owner = owner
        self.length = 0

    @property
    def capacity(self) -> int:
        return self.owner.capacity

    def capacity_bytes_for(
        self, length: int, source: Positions | None = None, shared: int = 0
    ) -> int:
        return self.owner.capacity_bytes_for(length, source, shared)

    def reserve(self, length: int) -> None:
        self.owner.reserve(length)


def paged_context(context: Positions) -> PagedContext:
    """``context`` as what runs on a device reads it. Raises TypeError as :func:`paged`."""
    if not isinstance(context, PagedContext):
        raise TypeError(f"a context on a device is a PagedContext, not {type(context).__name__}")
    return context
