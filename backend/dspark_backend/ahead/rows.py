"""Rows that follow lengths which only the device knows."""

from __future__ import annotations

from torch import Tensor

from dspark_backend.kernels.rope.triton import Places
from dspark_backend.kv.pages import PagePool
from dspark_backend.target.paged_rows import PagedRows


def rows_after(
    pool: PagePool,
    length: Tensor,
    table: Tensor,
    request: Tensor,
    slot: Tensor,
    offsets: Tensor,
    longest: int,
    **extra: Tensor,
) -> PagedRows:
    """R rows of B requests, in order: row r is ``slot[r]`` places after the first ``length``
    int32 [B] positions of its ``request[r]``.

    ``request`` int64 [R], ``slot`` int32 [R], ``offsets`` int32 [B + 1], ``table`` int32 [B, T],
    with ``longest`` and ``extra`` as in :class:`PagedRows`. Launches work and waits for none of it.
    """
    positions = length[request] + slot
    pages = table[request, (positions // pool.page_size).long()]
    places = Places(positions, pages, positions % pool.page_size)
    return PagedRows(pool, places, offsets, length, table, longest, extra)
