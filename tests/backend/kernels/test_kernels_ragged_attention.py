"""Ragged attention on the device against float64, and a row's independence of its company."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from dspark_backend.kernels.attention import reference as causal_reference
from dspark_backend.kernels.draft_attention import reference as block_reference
from dspark_backend.kernels.ragged_attention import reference
from dspark_backend.kernels.ragged_attention.contract import Batch, Sight
from dspark_backend.kernels.ragged_attention.triton import attend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU under Triton's interpreter
SMALL = {"split": 32, "pairs": 16, "keys": 16}
SHAPES = [(9, 3, 64, 16), (7, 1, 20, 7), (2, 1, 80, 1), (2, 2, 128, 33)]
RAGGED = [(3, 0), (1, 31), (0, 12), (6, 29), (4, 66)]
"""(rows, positions before them) of each request."""


def make_batch(
    sight: Sight,
    requests: list[tuple[int, int]] = RAGGED,
    shape: tuple[int, int, int, int] = (6, 2, 24, 8),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Batch:
    """Requests over shuffled pages; NaN in all slots and page ids astray where none may look."""
    heads, kv_heads, width, page_size = shape
    g = torch.Generator().manual_seed(seed)
    counts = [-(-(n + start) // page_size) for n, start in requests]
    pages = sum(counts) + 2
    free = torch.randperm(pages, generator=g)
    table = torch.full((len(requests), max(counts) + 1), 2**30, dtype=torch.int32)
    keys, values = torch.full((2, pages, kv_heads, page_size, width), torch.nan)
    taken = 0
    for b, (n, start) in enumerate(requests):
        mine = free[taken : taken + counts[b]]
        taken += counts[b]
        table[b, : counts[b]] = mine
        for t in range(n + start if n else 0):
            keys[mine[t // page_size], :, t % page_size] = torch.randn(kv_heads, width, generator=g)
            values[mine[t // page_size], :, t % page_size] = torch.randn(
                kv_heads, width, generator=g
            )
    rows = [n for n, _ in requests]
    return Batch(
        q=(2 * torch.randn(sum(rows), heads, width, generator=g)).to(dtype),
        offsets=torch.tensor([0, *np.cumsum(rows)], dtype=torch.int32),
        starts=torch.tensor([start for _, start in requests], dtype=torch.int32),
        keys=keys.to(dtype),
        values=values.to(dtype),
        table=table,
        longest=max(*rows, 1),
        sight=sight,
    )


def run(batch: Batch, **sizes: int) -> torch.Tensor:
    fields = {name: getattr(batch, name) for name in Batch.__slots__}
    moved = {n: f.to(DEVICE) if isinstance(f, torch.Tensor) else f for n, f in fields.items()}
    return attend(Batch(**moved), **(sizes or SMALL)).cpu()


def part(batch: Batch, b: int, first: int = 0, end: int | None = None) -> Batch:
    """Rows ``first:end`` of request b, alone and with a table of its own size."""
    offset = int(batch.offsets[b])
    end = int(batch.offsets[b + 1]) - offset if end is None else end
    start = int(batch.starts[b]) + first
    return replace(
        batch,
        q=batch.q[offset + first : offset + end].contiguous(),
        offsets=torch.tensor([0, end - first], dtype=torch.int32),
        starts=torch.tensor([start], dtype=torch.int32),
        table=batch.table[b : b + 1, : -(-(start + end - first) // batch.keys.shape[2])],
        longest=end - first,
    )


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(SHAPES[0], torch.float16), *product(SHAPES, [torch.float32, torch.bfloat16])],
    ids=str,
)
@pytest.mark.parametrize("sight", list(Sight))
def test_kernels_say_what_the_reference_says(
    sight: Sight, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    batch = make_batch(sight, shape=shape, dtype=dtype)
    # Weights are rounded to the dtype before they meet the values, and so is the result.
    tolerance = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    out = run(batch)
    assert out.dtype == dtype
    expected = reference.attend(batch)
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("sight", list(Sight))
def test_the_sizes_of_a_launch(sight: Sight) -> None:
    """As on a GPU, and with a tile that is shorter than a split and one that is not."""
    batch = make_batch(sight, [(9, 300), (2, 3)], (4, 2, 64, 16))
    expected = reference.attend(batch)
    for sizes in ({"split": 256, "pairs": 64, "keys": 64}, {"split": 64, "pairs": 32, "keys": 64}):
        torch.testing.assert_close(run(batch, **sizes).double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_the_reference_is_the_causal_oracle_on_pages(shape: tuple[int, int, int, int]) -> None:
    batch = make_batch(Sight.CAUSAL, shape=shape)
    out = reference.attend(batch)
    for b, (n, start) in enumerate(RAGGED):
        first = int(batch.offsets[b])
        keys, values = (laid_out(batch, pages, b) for pages in (batch.keys, batch.values))
        positions = torch.arange(start, start + n)
        expected = causal_reference.attend(batch.q[first : first + n], keys, values, positions)
        torch.testing.assert_close(out[first : first + n], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_the_reference_is_the_block_oracle_on_pages(shape: tuple[int, int, int, int]) -> None:
    batch = make_batch(Sight.BLOCK, shape=shape)
    out = reference.attend(batch)
    for b, (n, start) in enumerate(RAGGED):
        first = int(batch.offsets[b])
        keys, values = (laid_out(batch, pages, b) for pages in (batch.keys, batch.values))
        expected = block_reference.attend_block(
            batch.q[first : first + n],
            *(keys, values, start),
            *(keys[:, start : start + n], values[:, start : start + n]),
        )
        torch.testing.assert_close(out[first : first + n], expected, rtol=1e-12, atol=1e-12)


def laid_out(batch: Batch, pages: torch.Tensor, b: int) -> torch.Tensor:
    """The KV of request b position by position, [Hkv, positions, hd]."""
    end = int(batch.starts[b]) + int(batch.offsets[b + 1] - batch.offsets[b])
    size = pages.shape[2]
    slots = [pages[int(batch.table[b, t // size]), :, t % size] for t in range(end)]
    return torch.stack(slots, dim=1) if slots else pages[0, :, :0]


@pytest.mark.parametrize("sight", list(Sight))
def test_the_reference_is_a_loop_over_scalars(sight: Sight) -> None:
    batch = make_batch(sight, [(2, 3), (3, 0)], (4, 2, 5, 2))
    out = reference.attend(batch).numpy()
    q, keys, values = (t.double().numpy() for t in (batch.q, batch.keys, batch.values))
    for b in range(2):
        first, end = batch.offsets[b : b + 2].tolist()
        for row in range(first, end):
            sees = int(batch.starts[b]) + (
                row - first + 1 if sight == Sight.CAUSAL else end - first
            )
            for h in range(4):
                mass, total = 0.0, np.zeros(5)
                for t in range(sees):
                    page = int(batch.table[b, t // 2])
                    weight = np.exp(
                        sum(q[row, h, i] * keys[page, h // 2, t % 2, i] for i in range(5)) / 5**0.5
                    )
                    mass, total = mass + weight, total + weight * values[page, h // 2, t % 2]
                np.testing.assert_allclose(out[row, h], total / mass, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_causal_row_has_the_same_bits_in_any_company(dtype: torch.dtype) -> None:
    """Alone as in decoding, in parts as in chunked prefill, beside requests of other lengths."""
    batch = make_batch(Sight.CAUSAL, dtype=dtype)
    together = run(batch)
    for b, (n, _) in enumerate(RAGGED):
        for rows in (1, 4):
            for first in range(0, n, rows):
                end = min(first + rows, n)
                at = int(batch.offsets[b])
                alone = run(part(batch, b, first, end))
                assert torch.equal(alone, together[at + first : at + end])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_block_has_the_same_bits_in_any_company(dtype: torch.dtype) -> None:
    batch = make_batch(Sight.BLOCK, dtype=dtype)
    together = run(batch)
    for b, (n, _) in enumerate(RAGGED):
        if n:
            at = int(batch.offsets[b])
            assert torch.equal(run(part(batch, b)), together[at : at + n])


def test_where_pages_lie_does_not_change_bits() -> None:
    batch = make_batch(Sight.CAUSAL)
    order = torch.randperm(len(batch.keys), generator=torch.Generator().manual_seed(7))
    moved_to = torch.argsort(order).int()
    table = torch.where(batch.table < len(order), moved_to[batch.table % len(order)], batch.table)
    moved = replace(batch, keys=batch.keys[order], values=batch.values[order], table=table)
    assert torch.equal(run(moved), run(batch))


def test_forked_requests_share_pages() -> None:
    batch = make_batch(Sight.CAUSAL, [(2, 40), (2, 40)])
    assert batch.table.stride(0) == 7
    batch.table[1] = batch.table[0]
    batch.q[2:] = batch.q[:2]
    out = run(replace(batch, table=batch.table[:, :6]))  # a slice of a wider table
    assert torch.equal(out[:2], out[2:])
    torch.testing.assert_close(out.double(), reference.attend(batch), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("sight", list(Sight))
def test_huge_scores_stay_finite(sight: Sight) -> None:
    batch = make_batch(sight)
    batch.q.mul_(1e4)
    expected = reference.attend(batch)
    torch.testing.assert_close(run(batch).double(), expected, rtol=1e-3, atol=1e-3)


def test_peaks_in_the_first_and_in_the_last_split() -> None:
    """One position outweighs all others: sums of splits without it must fade to nothing."""
    batch = make_batch(Sight.CAUSAL, [(1, 99), (1, 99)], (2, 2, 16, 100))
    batch.keys[:] *= 1e-3
    batch.q[:] = 20.0
    for b, t in ((0, 0), (1, 99)):
        batch.keys[int(batch.table[b, 0]), :, t] = 20.0
    out = run(batch)
    for b, t in ((0, 0), (1, 99)):
        assert torch.equal(out[b], batch.values[int(batch.table[b, 0]), :, t])


def test_a_broken_request_breaks_no_other() -> None:
    batch = make_batch(Sight.CAUSAL, [(3, 20), (3, 20), (2, 9)])
    whole = run(batch)
    page = int(batch.table[1, 0])
    batch.keys[page, :, 3] = torch.nan
    out = run(batch)
    assert torch.equal(out[:3], whole[:3])
    assert torch.equal(out[6:], whole[6:])
    assert not out[3:6].isfinite().any()


def test_no_rows_are_no_work() -> None:
    batch = make_batch(Sight.CAUSAL, [(0, 5), (0, 0)])
    assert run(batch).shape == (0, 6, 24)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"q": torch.zeros(14, 5, 24)}, "5 query heads do not share 2 kv heads"),
        ({"q": torch.zeros(14, 6, 24).double()}, "q is [R, H, hd] of bfloat16"),
        ({"keys": torch.zeros(1, 2, 8, 24)}, "values is torch.float32 [1, 2, 8, 24]"),
        ({"starts": torch.zeros(5).long()}, "starts is torch.int32 [5]"),
        ({"table": torch.zeros(4, 3).int()}, "table is torch.int32 [5, T]"),
        ({"table": torch.zeros(9, 5).int().T}, "table is torch.int32 [5, T]"),
        ({"longest": 0}, "longest is 0"),
    ],
)
def test_a_broken_contract_is_named(change: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        replace(make_batch(Sight.CAUSAL), **change)


@pytest.mark.parametrize("sizes", [{"keys": 8}, {"pairs": 8}, {"split": 96, "keys": 64}], ids=str)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="is a multiple of keys"):
        run(make_batch(Sight.CAUSAL), **{**SMALL, **sizes})
