"""Where the rows of a pass lie in the pages of their sequences, as the device's kernels read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspark_backend.kernels.ragged_attention.contract import Batch, Sight
from dspark_backend.kernels.ragged_attention.triton import attend
from dspark_backend.kernels.rope.triton import Places, Rotation, rope_append
from dspark_backend.kernels.upload import upload
from dspark_backend.kv.paged import PagedKV
from dspark_backend.kv.pages import PagePool


@dataclass(frozen=True, slots=True)
class Span:
    """``count`` rows of ``kv``, at positions ``start ..``; there is room for them."""

    kv: PagedKV
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class PagedRows:
    """The rows of all spans, one span after the other. ``offsets``, ``starts`` and ``table`` are
    those of :class:`~dspark_backend.kernels.ragged_attention.contract.Batch`; ``extra`` is what
    else went to the device in the same copy."""

    pool: PagePool
    places: Places
    offsets: Tensor
    starts: Tensor
    table: Tensor
    longest: int
    extra: Mapping[str, Tensor]

    @classmethod
    def of(cls, spans: Sequence[Span], device: torch.device, **extra: NDArray[Any]) -> PagedRows:
        """Raises ValueError for spans that there is no room for, or of several pools."""
        pool = spans[0].kv.pool
        size = pool.page_size
        used = [-(-(span.start + span.count) // size) for span in spans]
        for span, pages in zip(spans, used, strict=True):
            if span.kv.pool is not pool:
                raise ValueError("sequences of one pass lie in the pages of one pool")
            if pages > len(span.kv.pages):
                raise ValueError(
                    f"{span.start + span.count} positions do not fit: room for "
                    f"{span.kv.capacity} reserved"
                )
        table = np.zeros((len(spans), max(used)), np.int32)
        positions, pages_of = [], []
        for number, span in enumerate(spans):
            table[number, : used[number]] = span.kv.pages[: used[number]]
            at = np.arange(span.start, span.start + span.count, dtype=np.int32)
            positions.append(at)
            pages_of.append(table[number, at // size])
        flat = np.concatenate(positions)
        counts = [span.count for span in spans]
        there = upload(
            {
                **extra,
                "positions": flat,
                "pages": np.concatenate(pages_of),
                "slots": (flat % size).astype(np.int32),
                "offsets": np.cumsum([0, *counts]).astype(np.int32),
                "starts": np.array([span.start for span in spans], np.int32),
                "table": table,
            },
            device,
        )
        places = Places(there["positions"], there["pages"], there["slots"])
        rest = {name: there[name] for name in extra}
        return cls(
            pool, places, there["offsets"], there["starts"], there["table"], max(counts), rest
        )

    def attend(self, layer: int, qkv: Tensor, rotation: Rotation, sight: Sight) -> Tensor:
        """Write keys and values of ``qkv`` [R, (H + 2 Hkv) hd] to the pages of ``layer``, and what
        its queries see there: [R, H * hd]."""
        q = self.append(layer, qkv, rotation)
        keys, values = self.pool.keys[layer], self.pool.values[layer]
        batch = Batch(q, self.offsets, self.starts, keys, values, self.table, self.longest, sight)
        return attend(batch).flatten(1)

    def append(self, layer: int, qkv: Tensor, rotation: Rotation) -> Tensor:
        """Write keys and values of ``qkv`` to the pages of ``layer``; its queries [R, H, hd]."""
        keys, values = self.pool.keys[layer], self.pool.values[layer]
        return rope_append(qkv, self.places, rotation, keys, values)
