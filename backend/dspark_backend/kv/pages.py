"""The pages of a device's keys and values: where they lie, and who holds them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain

import torch

from dspark_backend.errors import CapacityError
from dspark_backend.kv.budget import KVBudget, KVShape

PAGE = 64
"""Positions of a page."""


class PagePool:
    """P pages of S positions, all layers of the target and then those of the drafter in each.

    ``keys`` and ``values`` are ``[layers, P + 1, Hkv, S, hd]`` of ``dtype``; a layer of them is
    what ``kernels/ragged_attention`` reads. The last page, ``scratch``, is nobody's: what pads a
    pass is written there. A page that one sequence alone holds may be written; one
    that several hold may not. Pages count against ``budget``, each once. Not thread-safe.
    """

    def __init__(
        self,
        shape: KVShape,
        draft_layers: int,
        limit_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
        page_size: int = PAGE,
    ) -> None:
        """``shape`` is the target's. Raises CapacityError where the device has no such memory."""
        layers = shape.layers + draft_layers
        self.target_layers = shape.layers
        self.page_size = page_size
        self.page_bytes = (
            KVShape(layers, shape.kv_heads, shape.head_dim, dtype.itemsize).bytes_per_token
            * page_size
        )
        pages = limit_bytes // self.page_bytes
        self.budget = KVBudget(pages * self.page_bytes)
        self.scratch = pages
        size = (layers, pages + 1, shape.kv_heads, page_size, shape.head_dim)
        try:
            self.keys = torch.empty(size, dtype=dtype, device=device)
            self.values = torch.empty(size, dtype=dtype, device=device)
        except torch.OutOfMemoryError as error:
            raise CapacityError(
                f"{device} has no room for {limit_bytes / 2**20:.0f} MiB of keys and values: load "
                "the engine with a smaller kv_bytes"
            ) from error
        self._free = list(range(pages - 1, -1, -1))
        self._holders = [0] * pages

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def holders(self, page: int) -> int:
        """How many sequences hold ``page``."""
        return self._holders[page]

    def take(self, count: int) -> list[int]:
        """``count`` pages for one sequence. Raises CapacityError; nothing is taken then."""
        self.budget.take(count * self.page_bytes)
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Another sequence holds ``pages``, which somebody holds already."""
        for page in pages:
            self._holders[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """A sequence holds ``pages`` no more; those that nobody holds are free."""
        for page in pages:
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._free.append(page)
                self.budget.give_back(self.page_bytes)

    def copy(self, source: Sequence[int], target: Sequence[int]) -> None:
        """The contents of the pages ``source``, all layers, to the pages ``target``."""
        for old, new in zip(source, target, strict=True):
            self.keys[:, new] = self.keys[:, old]
            self.values[:, new] = self.values[:, old]

    def reclaimable_bytes(self, held: Iterable[Sequence[int]]) -> int:
        """Budget that comes back where these holders, each with its pages, hold them no more."""
        gone = Counter(chain.from_iterable(held))
        return sum(self._holders[page] == count for page, count in gone.items()) * self.page_bytes
