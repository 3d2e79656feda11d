"""The sequential stage on the device against float64, ties, masks and dead slots included."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from dspark_backend.kernels.contract import Masks
from dspark_backend.kernels.markov import reference
from dspark_backend.kernels.markov.contract import Blocks, Head
from dspark_backend.kernels.markov.triton import draft
from dspark_backend.sampling.mask import unpack

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU under Triton's interpreter
SIZES = [(1, 1, 1, 1, 1), (3, 7, 50, 33, 5), (17, 3, 400, 131, 64), (2, 4, 150, 150, 100)]
"""B, g, V, D, r."""


def make_blocks(
    size: tuple[int, int, int, int, int],
    dtype: torch.dtype = torch.float32,
    *,
    masked: bool = True,
    exact: bool = True,
) -> Blocks:
    """Small whole numbers, where ``exact``: no sum rounds, so that ties are many and are ties."""
    requests, slots, vocab, drafts, rank = size
    g = torch.Generator().manual_seed(sum(size))

    def numbers(*shape: int) -> torch.Tensor:
        if exact:
            return torch.randint(-1, 2, shape, generator=g).to(dtype)
        return torch.randn(*shape, generator=g).to(dtype)

    words = torch.randint(-(2**31), 2**31, (3, (vocab + 31) // 32), generator=g).int()
    of_row = torch.randint(-1, 3, (requests * slots,), generator=g).int()
    ids = torch.randperm(vocab, generator=g)[:drafts].sort().values.int()
    return Blocks(
        base=numbers(requests, slots, drafts),
        anchors=torch.randint(0, vocab, (requests,), generator=g).int(),
        head=Head(numbers(vocab, rank), numbers(drafts, rank), None if vocab == drafts else ids),
        masks=Masks(words, of_row) if masked else None,
    )


def run(blocks: Blocks, block: int = 16) -> torch.Tensor:
    def move(value: object) -> object:
        if isinstance(value, torch.Tensor):
            return value.to(DEVICE)
        if isinstance(value, Masks | Head):
            return type(value)(*(move(getattr(value, f)) for f in value.__slots__))
        return value

    moved = Blocks(**{f: move(getattr(blocks, f)) for f in Blocks.__slots__})
    return draft(moved, block=block).cpu()


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "free"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
def test_kernels_draft_what_the_reference_drafts(
    size: tuple[int, int, int, int, int], dtype: torch.dtype, masked: bool
) -> None:
    blocks = make_blocks(size, dtype, masked=masked)
    expected = reference.draft(blocks)
    for block in (16, 128):
        assert run(blocks, block).tolist() == expected.tolist()


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "free"])
@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
def test_the_reference_is_a_loop_over_scalars(
    size: tuple[int, int, int, int, int], masked: bool
) -> None:
    blocks = make_blocks(size, masked=masked)
    requests, slots, vocab, drafts, _ = size
    ids = range(drafts) if blocks.head.ids is None else blocks.head.ids.tolist()
    w1, w2 = blocks.head.w1.double().numpy(), blocks.head.w2.double().numpy()
    for b in range(requests):
        token, expected = int(blocks.anchors[b]), []
        for k in range(slots):
            mask_row = -1 if blocks.masks is None else int(blocks.masks.of_row[b * slots + k])
            legal = np.ones(vocab, bool)
            if blocks.masks is not None and mask_row >= 0:
                legal = unpack(blocks.masks.words[mask_row], vocab)
            best, choice = -np.inf, -1
            for d in range(drafts):
                score = float(blocks.base[b, k, d]) + float((w1[token] * w2[d]).sum())
                if token >= 0 and legal[ids[d]] and score > best:
                    best, choice = score, ids[d]
            token = choice
            expected.append(choice)
            if choice < 0:
                expected += [-1] * (slots - k - 1)
                break
        assert reference.draft(blocks)[b].tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounding_moves_a_draft_to_a_near_tie_at_most(dtype: torch.dtype) -> None:
    blocks = make_blocks((5, 4, 300, 120, 130), dtype, masked=False, exact=False)
    tokens = run(blocks)
    assert blocks.head.ids is not None
    for b in range(5):
        previous = int(blocks.anchors[b])
        for k in range(4):
            row = reference.logits(blocks, b, k, previous)
            previous = int(tokens[b, k])
            column = int((blocks.head.ids == previous).nonzero())
            assert float(row.max() - row[column]) < 1e-4


def test_a_request_drafts_the_same_in_any_company() -> None:
    blocks = make_blocks((19, 4, 300, 70, 24), exact=False)
    together = run(blocks)
    assert blocks.masks is not None
    for b in (0, 15, 16, 18):
        masks = replace(blocks.masks, of_row=blocks.masks.of_row[4 * b : 4 * b + 4])
        alone = replace(
            blocks, base=blocks.base[b : b + 1], anchors=blocks.anchors[b : b + 1], masks=masks
        )
        assert torch.equal(run(alone)[0], together[b])


def test_the_token_before_decides() -> None:
    """W2 . W1 is a cycle of token ids over flat base logits: the chain walks it."""
    vocab = 40
    blocks = make_blocks((3, 6, vocab, vocab, vocab), masked=False)
    step = torch.eye(vocab).roll(7, dims=1)
    head = Head(step.contiguous(), torch.eye(vocab))
    blocks = replace(blocks, base=torch.zeros(3, 6, vocab), head=head)
    expected = [[(int(a) + 7 * (k + 1)) % vocab for k in range(6)] for a in blocks.anchors]
    assert run(blocks).tolist() == expected


def test_equal_logits_go_to_the_lowest_legal_id() -> None:
    """Over blocks of draft ids, for negative scores, and for the two zeros, which are equal."""
    blocks = make_blocks((3, 1, 80, 80, 2), masked=False)
    base = torch.full((3, 1, 80), -3.5)
    base[0, 0, [70, 33, 34]], base[1] = -1.5, 0.0
    base[1, 0, :20] = -0.0
    head = Head(torch.zeros(80, 2), torch.zeros(80, 2))
    words = torch.tensor([[-(2**31), -1, -1]]).int()  # from id 31 on
    masks = Masks(words, torch.tensor([-1, -1, 0]).int())
    assert run(replace(blocks, base=base, head=head, masks=masks)).tolist() == [[33], [0], [31]]


def test_a_slot_without_a_usable_maximum_ends_its_chain_alone() -> None:
    """All masked, all -inf, a legal NaN, a legal +inf; and forbidden ones do no harm."""
    blocks = make_blocks((6, 3, 40, 40, 3), masked=False)
    blocks.base[1, 1] = -torch.inf
    blocks.base[2, 1, 7], blocks.base[3, 0, 39] = torch.nan, torch.inf
    blocks.base[4, 1, 8], blocks.base[4, 1, 9] = torch.nan, torch.inf
    of_row = torch.full((18,), -1, dtype=torch.int32)
    of_row[0 * 3 + 2], of_row[4 * 3 + 1] = 0, 1
    words = torch.tensor([[0, 0], [~(3 << 8), -1]]).int()
    blocks = replace(blocks, masks=Masks(words, of_row))
    tokens = run(blocks)
    assert tokens.tolist() == reference.draft(blocks).tolist()
    assert (tokens >= 0).sum(1).tolist() == [2, 1, 1, 0, 3, 3]


def test_a_mask_shorter_than_the_vocabulary_forbids_the_rest() -> None:
    blocks = make_blocks((2, 3, 90, 60, 4), masked=False)
    masks = Masks(torch.tensor([[-1]]).int(), torch.zeros(6).int())
    blocks = replace(blocks, masks=masks)
    tokens = run(blocks)
    assert tokens.tolist() == reference.draft(blocks).tolist()
    assert int(tokens.max()) < 32


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"base": torch.zeros(3, 7, 32)}, "w2 is torch.float32 [32, 5]"),
        ({"base": torch.zeros(3, 33)}, "base is [B, g, D]"),
        ({"anchors": torch.zeros(3).long()}, "anchors is torch.int32 [3]"),
        ({"head": Head(torch.zeros(50, 5), torch.zeros(33, 5))}, "33 draft ids stand for 50"),
        ({"head": Head(torch.zeros(50, 5).double(), torch.zeros(33, 5))}, "w1 is [V, r] of"),
        ({"masks": Masks(torch.zeros(1, 2).int(), torch.zeros(3).int())}, "torch.int32 [21]"),
    ],
)
def test_a_broken_contract_is_named(change: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        replace(make_blocks((3, 7, 50, 33, 5)), **change)
