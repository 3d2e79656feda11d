"""What ragged attention is given: the new rows of all requests, and the pages of their KV."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from dspark_backend.kernels.contract import FLOATS, describe, expect, expect_on


class Sight(IntEnum):
    """Which positions a row attends to."""

    CAUSAL = 0  # all up to its own: the target's rows
    BLOCK = 1  # the context and the whole block, both ways: a drafter's rows (DSPARK.md, section 2)


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of B requests: row k of request b is at position ``starts[b] + k``.

    ``q`` [R, H, hd] bfloat16, float16 or float32, after RoPE; ``offsets`` int32 [B + 1], request b
    has the rows ``offsets[b]:offsets[b + 1]``, or none; ``starts`` int32 [B], its positions before
    them. ``longest`` bounds the rows of a request: the host knows it, so that a launch depends on
    nothing that lies on the device.

    ``keys`` and ``values`` [P, Hkv, S, hd] of q's dtype are P pages of S positions; H is a multiple
    of Hkv. Position t of request b is slot ``t % S`` of page ``table[b, t // S]``; ``table`` int32
    [B, T], rows contiguous, may be a slice of the first T columns of a wider one. Requests may
    share pages. KV of the rows themselves is written before the call, a drafter's block too (its
    next context overwrites it). Positions that no row of a request sees are not read, so page ids
    past them are free; a NaN or infinity in a position that one row sees may reach its whole
    request, and no other. Nothing is written to.
    """

    q: Tensor
    offsets: Tensor
    starts: Tensor
    keys: Tensor
    values: Tensor
    table: Tensor
    longest: int
    sight: Sight

    def __post_init__(self) -> None:
        """Raises ValueError for shapes, dtypes or devices that break the contract. Values lie on
        the device and are not looked at."""
        if self.q.dim() != 3 or self.q.dtype not in FLOATS or self.q.shape[2] == 0:
            raise ValueError(
                f"q is [R, H, hd] of bfloat16, float16 or float32, not {describe(self.q)}"
            )
        if self.keys.dim() != 4:
            raise ValueError(f"keys are [P, Hkv, S, hd], not {describe(self.keys)}")
        if self.longest < 1:
            raise ValueError(f"a request has at least one row: longest is {self.longest}")
        heads, width = self.q.shape[1:]
        pages, kv_heads, page_size, _ = self.keys.shape
        if page_size == 0 or kv_heads == 0 or heads == 0 or heads % kv_heads:
            raise ValueError(
                f"{heads} query heads do not share {kv_heads} kv heads over pages of {page_size} "
                "positions: H is a multiple of Hkv, and none of the three is 0"
            )
        requests = self.offsets.shape[0] - 1
        expect("q", self.q, self.q.device, self.q.dtype, *self.q.shape)
        expect("offsets", self.offsets, self.q.device, torch.int32, requests + 1)
        expect("starts", self.starts, self.q.device, torch.int32, requests)
        for name, kv in (("keys", self.keys), ("values", self.values)):
            expect(name, kv, self.q.device, self.q.dtype, pages, kv_heads, page_size, width)
        self._expect_table(requests)

    @property
    def requests(self) -> int:
        """B."""
        return self.offsets.shape[0] - 1

    @property
    def capacity(self) -> int:
        """Positions that a row of ``table`` reaches."""
        return self.table.shape[1] * self.keys.shape[2]

    def _expect_table(self, requests: int) -> None:
        table = self.table
        right = table.dtype == torch.int32 and table.dim() == 2 and len(table) == requests
        if not right or (table.numel() > 0 and table.stride(1) != 1):
            raise ValueError(
                f"table is torch.int32 [{requests}, T] with contiguous rows, not {describe(table)}"
            )
        expect_on("table", table, self.q.device)
