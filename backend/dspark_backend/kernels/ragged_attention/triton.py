"""Ragged attention on the device: two launches for all requests, no synchronisation.

1. ``_attend_split``, one program a tile of a request's (row, query head) pairs, kv head and split
   of its positions (flash-decoding, Dao et al. 2023): softmax over the split, one pass over its KV.
2. ``_combine``, one program a row and head: its splits in order.

A row's result depends on that row alone. Splits and tiles are of fixed size and begin at fixed
positions, whatever else is in the call; a tile of keys that a row does not see leaves its sums as
they are, and its own number of splits is combined, one after the other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dspark_backend.kernels.device import device_kernel, kernel_of_varying, product
from dspark_backend.kernels.ragged_attention.contract import Batch, Sight

SPLIT = 256
"""Positions that a program reads."""
PAIRS = 64
"""(row, query head) pairs that a program holds: all that share a kv head read its KV once."""
KEYS = 64
"""Positions in a step of a program."""

_BLOCK = tl.constexpr(int(Sight.BLOCK))


def attend(batch: Batch, *, split: int = SPLIT, pairs: int = PAIRS, keys: int = KEYS) -> Tensor:
    """What :func:`dspark_backend.kernels.ragged_attention.reference.attend` computes, [R, H, hd] of
    q's dtype; products in q's dtype, sums in float32.

    ``split``, a multiple of ``keys``, and the powers of two ``pairs`` and ``keys`` (16 at least)
    decide the order of additions: rows that are to be equal bit by bit share them. Allocates
    scratch of ``4 (hd + 2)`` bytes for each row, head and split of ``batch.capacity``: give a table
    no wider than the longest request of the call, and prefill in chunks.
    """
    if keys < 16 or pairs < 16 or split < keys or split % keys:
        raise ValueError(
            f"split {split} is a multiple of keys {keys}; keys and pairs {pairs} are 16 at least"
        )
    rows, heads, width = batch.q.shape
    kv_heads, page_size = batch.keys.shape[1:3]
    out = torch.empty_like(batch.q)
    if rows == 0 or batch.requests == 0:
        return out
    splits = triton.cdiv(batch.capacity, split)
    group = heads // kv_heads
    tiles = triton.cdiv(batch.longest * group, pairs)
    sums = torch.empty(rows, heads, splits, width, dtype=torch.float32, device=out.device)
    # Two allocations: where the second half of one lies would depend on the number of rows, and a
    # kernel is compiled for pointers to multiples of 16 bytes or for others.
    peaks, masses = (
        torch.empty(rows, heads, splits, dtype=torch.float32, device=out.device) for _ in range(2)
    )
    request = (batch.offsets, batch.starts)
    sizes = {"SIGHT": int(batch.sight), "HEADS": heads, "WIDTH": width, "SPLIT": split}
    padded = max(16, triton.next_power_of_2(width))
    _attend_split[(batch.requests * tiles, kv_heads, splits)](
        *request,
        *(batch.q, batch.keys, batch.values, batch.table, batch.table.stride(0)),
        *(sums, peaks, masses),
        tiles,
        width**-0.5,
        **sizes,
        GROUP=group,
        PADDED=padded,
        PAGE=page_size,
        PAIRS=pairs,
        KEYS=keys,
        UPCAST=not out.is_cuda,
    )
    _combine[(batch.requests * batch.longest, heads)](
        *request,
        *(sums, peaks, masses, out),
        *(splits, batch.longest),
        **sizes,
        PADDED=padded,
    )
    return out


@device_kernel
def _seen(
    start: tl.tensor,
    k: tl.tensor,
    rows: tl.tensor,
    SIGHT: tl.constexpr,  # noqa: N803
) -> tl.tensor:
    """How many positions row k of a request sees."""
    seen = start + k + 1
    if SIGHT == _BLOCK:
        seen = start + rows + 0 * k
    return seen


@kernel_of_varying("table_stride", "tiles")
def _attend_split(
    offsets: tl.tensor,
    starts: tl.tensor,
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    table: tl.tensor,
    table_stride: tl.tensor,
    sums: tl.tensor,
    peaks: tl.tensor,
    masses: tl.tensor,
    tiles: tl.tensor,
    scale: tl.tensor,
    SIGHT: tl.constexpr,  # noqa: N803
    HEADS: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
    SPLIT: tl.constexpr,  # noqa: N803
    GROUP: tl.constexpr,  # noqa: N803
    PADDED: tl.constexpr,  # noqa: N803
    PAGE: tl.constexpr,  # noqa: N803
    PAIRS: tl.constexpr,  # noqa: N803
    KEYS: tl.constexpr,  # noqa: N803
    UPCAST: tl.constexpr,  # noqa: N803
) -> None:
    """``sums`` [R, H, splits, hd], unnormalised, ``peaks`` and ``masses`` [R, H, splits], float32:
    of the splits that each row sees, and no others."""
    b, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    kv_head, split = tl.program_id(1), tl.program_id(2)
    first = tl.load(offsets + b)
    rows, start = tl.load(offsets + b + 1) - first, tl.load(starts + b)
    pair = tile * PAIRS + tl.arange(0, PAIRS)
    k, head = pair // GROUP, kv_head * GROUP + pair % GROUP
    is_row = k < rows
    seen = tl.where(is_row, _seen(start, k, rows, SIGHT), 0)
    begin = split * SPLIT
    end = tl.minimum(tl.max(seen, axis=0), begin + SPLIT)
    if begin < end:
        column = tl.arange(0, PADDED)
        inside = column < WIDTH
        row_head = (first + k).to(tl.int64) * HEADS + head
        query = tl.load(
            q + row_head[:, None] * WIDTH + column[None, :],
            mask=is_row[:, None] & inside[None, :],
            other=0.0,
        )
        peak = tl.full((PAIRS,), float("-inf"), tl.float32)
        mass = tl.zeros((PAIRS,), tl.float32)
        total = tl.zeros((PAIRS, PADDED), tl.float32)
        for t in range(begin, end, KEYS):
            position = t + tl.arange(0, KEYS)
            page = tl.load(
                table + b.to(tl.int64) * table_stride + position // PAGE,
                mask=position < end,
                other=0,
            )
            at = (page.to(tl.int64) * tl.num_programs(1) + kv_head) * PAGE + position % PAGE
            at = at[:, None] * WIDTH + column[None, :]
            is_read = (position < end)[:, None] & inside[None, :]
            # Unread values are 0: a weight of 0 would not hide a NaN.
            key = tl.load(keys + at, mask=is_read, other=0.0)
            value = tl.load(values + at, mask=is_read, other=0.0)
            score = product(query, tl.trans(key), UPCAST) * scale
            score = tl.where(position[None, :] < seen[:, None], score, float("-inf"))
            top = tl.maximum(peak, tl.max(score, axis=1))
            base = tl.where(top > float("-inf"), top, 0.0)  # -inf: nothing seen so far
            kept = tl.exp(peak - base)
            weight = tl.exp(score - base[:, None])
            mass = mass * kept + tl.sum(weight, axis=1)
            total = total * kept[:, None] + product(weight.to(value.dtype), value, UPCAST)
            peak = top
        out = row_head * tl.num_programs(2) + split
        is_seen = begin < seen
        tl.store(
            sums + out[:, None] * WIDTH + column[None, :],
            total,
            mask=is_seen[:, None] & inside[None, :],
        )
        tl.store(peaks + out, peak, mask=is_seen)
        tl.store(masses + out, mass, mask=is_seen)


@kernel_of_varying("splits", "longest")
def _combine(
    offsets: tl.tensor,
    starts: tl.tensor,
    sums: tl.tensor,
    peaks: tl.tensor,
    masses: tl.tensor,
    out: tl.tensor,
    splits: tl.tensor,
    longest: tl.tensor,
    SIGHT: tl.constexpr,  # noqa: N803
    HEADS: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
    SPLIT: tl.constexpr,  # noqa: N803
    PADDED: tl.constexpr,  # noqa: N803
) -> None:
    """``out`` [R, H, hd]: the splits of a row under one peak, in order, over their mass."""
    b, k = tl.program_id(0) // longest, tl.program_id(0) % longest
    first = tl.load(offsets + b)
    rows = tl.load(offsets + b + 1) - first
    if k < rows:
        column = tl.arange(0, PADDED)
        row_head = (first + k).to(tl.int64) * HEADS + tl.program_id(1)
        # One after the other: the shape of a tree would follow the longest request of the call.
        own = (_seen(tl.load(starts + b), k, rows, SIGHT) + SPLIT - 1) // SPLIT
        peak = tl.full((), float("-inf"), tl.float32)
        mass = tl.full((), 0.0, tl.float32)
        total = tl.zeros((PADDED,), tl.float32)
        for split in range(own):
            at = row_head * splits + split
            here = tl.load(peaks + at)
            top = tl.maximum(peak, here)
            kept, gained = tl.exp(peak - top), tl.exp(here - top)
            part = tl.load(sums + at * WIDTH + column, mask=column < WIDTH, other=0.0)
            mass = mass * kept + tl.load(masses + at) * gained
            total = total * kept + part * gained
            peak = top
        tl.store(
            out + row_head * WIDTH + column,
            (total / mass).to(out.dtype.element_ty),
            mask=column < WIDTH,
        )
