"""The sequences of an engine whose target runs on a device, and what is kept of them."""

from __future__ import annotations

import torch

from dspark_backend.kv.budget import KVBudget, KVShape
from dspark_backend.kv.page_tree import PageTree
from dspark_backend.kv.paged import PagedKV
from dspark_backend.kv.pages import PAGE, PagePool


class PagedStorage:
    """The sequences of an engine whose target runs on a device."""

    def __init__(
        self,
        shape: KVShape,
        draft: KVShape | None,
        limit_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
        page_size: int = PAGE,
    ) -> None:
        """``shape`` is the target's, ``draft`` the drafter's, if there is one.

        Raises ValueError where the two differ in more than layers, and CapacityError where the
        device has no memory of ``limit_bytes``, which is taken at once.
        """
        heads = None if draft is None else (draft.kv_heads, draft.head_dim)
        if heads not in (None, (shape.kv_heads, shape.head_dim)):
            raise ValueError(
                f"a drafter of {heads} kv heads and head width does not fit into the pages of a "
                f"target of {(shape.kv_heads, shape.head_dim)}"
            )
        layers = 0 if draft is None else draft.layers
        self.pool = PagePool(shape, layers, limit_bytes, dtype, device, page_size)
        self._drafts = draft is not None

    @property
    def budget(self) -> KVBudget:
        return self.pool.budget

    def new(self) -> PagedKV:
        """An empty sequence; it holds no memory yet."""
        return PagedKV(self.pool, drafts=self._drafts)

    def prefixes(self, limit_bytes: int) -> PageTree:
        """As :meth:`Storage.prefixes`."""
        return PageTree(self.new, limit_bytes)
