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
from dspark_backend.kernels.recording import bucket
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
class Layout:
    """Rows as the host lays them out: ``arrays`` for the device, those of :class:`PagedRows` and
    ``extra`` ones by name, of ``rows`` rows in all."""

    pool: PagePool
    arrays: dict[str, NDArray[Any]]
    extra: tuple[str, ...]
    longest: int

    @classmethod
    def of(cls, spans: Sequence[Span], columns: int = 1, **extra: NDArray[Any]) -> Layout:
        """The table is as wide as a multiple of ``columns`` pages. Raises ValueError for spans that
        there is no room for, or of several pools."""
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
        table = np.zeros((len(spans), -(-max(used) // columns) * columns), np.int32)
        positions, pages_of = [], []
        for number, span in enumerate(spans):
            table[number, : used[number]] = span.kv.pages[: used[number]]
            at = np.arange(span.start, span.start + span.count, dtype=np.int32)
            positions.append(at)
            pages_of.append(table[number, at // size])
        flat = np.concatenate(positions)
        counts = [span.count for span in spans]
        arrays = {
            **extra,
            "positions": flat,
            "pages": np.concatenate(pages_of),
            "slots": (flat % size).astype(np.int32),
            "offsets": np.cumsum([0, *counts]).astype(np.int32),
            "starts": np.array([span.start for span in spans], np.int32),
            "table": table,
        }
        return cls(pool, arrays, tuple(extra), max(counts))

    @property
    def rows(self) -> int:
        return len(self.arrays["positions"])

    def padded(self, rows: int, **extra: int) -> Layout:
        """As many rows as given, and of each array of ``extra`` as many entries, 0 for what comes
        on top: those rows are a sequence in the pool's scratch page, or none is. A recording for
        this size serves all layouts that are padded to it."""
        arrays, size = self.arrays, self.pool.page_size
        more, count = rows - self.rows, len(arrays["starts"])
        requests = bucket(count + (more > 0))
        empty = requests - count
        at = (np.arange(more) % size).astype(np.int32)
        ends = np.full(empty, rows, np.int32)
        table = np.full((empty, arrays["table"].shape[1]), self.pool.scratch, np.int32)
        padded: dict[str, NDArray[Any]] = {
            "positions": np.concatenate([arrays["positions"], at]),
            "pages": np.concatenate([arrays["pages"], np.full_like(at, self.pool.scratch)]),
            "slots": np.concatenate([arrays["slots"], at]),
            "offsets": np.concatenate([arrays["offsets"], ends]),
            "starts": np.concatenate([arrays["starts"], np.zeros(empty, np.int32)]),
            "table": np.concatenate([arrays["table"], table]),
        }
        for name in self.extra:
            array = arrays[name]
            fill = np.zeros((extra[name] - len(array), *array.shape[1:]), array.dtype)
            padded[name] = np.concatenate([array, fill])
        longest = 1 << (max(self.longest, more) - 1).bit_length()
        return Layout(self.pool, padded, self.extra, longest)

    def on(self, device: torch.device) -> PagedRows:
        """The rows, with all arrays copied to ``device``."""
        return self.reading(upload(self.arrays, device))

    def reading(self, there: Mapping[str, Tensor]) -> PagedRows:
        """The rows as ``there`` says, tensors by the names of ``arrays``."""
        places = Places(there["positions"], there["pages"], there["slots"])
        rest = {name: there[name] for name in self.extra}
        return PagedRows(
            *(self.pool, places, there["offsets"], there["starts"], there["table"]),
            self.longest,
            rest,
        )


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
