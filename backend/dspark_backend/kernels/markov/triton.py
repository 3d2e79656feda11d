"""The sequential stage on the device: a launch a slot, and one before and after them all; no
synchronisation.

``_slot``, one program a block of draft ids and tile of requests: it reads x_{k-1}, adds
W2 . W1[x_{k-1}] to its share of slot k and leaves its best as one atomic maximum, so that no launch
is spent on an argmax. W2 is read once a slot for all requests of a tile. One launch for all slots
would need a barrier between programs, which Triton does not give.

A row's result depends on that row alone: tiles and blocks are of fixed size, and a maximum is the
same in any order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dspark_backend.kernels.contract import mask_arguments
from dspark_backend.kernels.device import device_kernel, kernel_of_varying, product
from dspark_backend.kernels.markov.contract import Blocks

BLOCK = 128
"""Draft ids that a program looks at."""
REQUESTS = 16
"""Requests that a program serves: the narrowest product that tensor cores take."""
RANK = 64
"""Columns of W1 and W2 in a step of a program."""

_NO_ID = tl.constexpr(0x7FFFFFFF)  # above every draft id; also the bits that order negative floats
_NO_KEY = tl.constexpr(-(2**63))  # below every key; its score is a NaN


def draft(blocks: Blocks, *, block: int = BLOCK) -> Tensor:
    """x_k = argmax(U_k + W2 . W1[x_{k-1}]) over the slot's legal tokens, slot by slot from the
    anchors: token ids, int32 [B, g]; among equals the lowest id.

    A slot without a finite maximum over its legal tokens (everything is masked or -inf, or there is
    a NaN or +inf among them) gives -1, and so do all slots after it. Products are of the head's
    dtype, sums in float32; ``block`` is a power of two, 16 at least. Allocates scratch of 8 bytes
    for each slot.
    """
    if block < 16:
        raise ValueError(f"block {block} is a power of two, 16 at least")
    base, head, masks = blocks.base, blocks.head, blocks.masks
    requests, size, drafts = base.shape
    tokens = torch.empty(requests, size, dtype=torch.int32, device=base.device)
    if requests == 0:
        return tokens
    keys = torch.full((requests, size), _NO_KEY.value, dtype=torch.int64, device=base.device)
    chain = (keys, blocks.anchors, blocks.anchors if head.ids is None else head.ids)
    mask = mask_arguments(masks, blocks.anchors)
    for k in range(size):
        _slot[(triton.cdiv(drafts, block), triton.cdiv(requests, REQUESTS))](
            *chain,
            *(base, head.w1, head.w2, *mask),
            *(requests, drafts, k, size),
            MAPPED=head.ids is not None,
            WIDTH=head.w1.shape[1],
            BLOCK=block,
            TILE=REQUESTS,
            STEP=RANK,
            UPCAST=not base.is_cuda,
        )
    _settle[(triton.cdiv(requests * size, 128),)](
        *chain, tokens, requests * size, MAPPED=head.ids is not None, TILE=128
    )
    return tokens


@device_kernel
def _key(score: tl.tensor, draft_id: tl.tensor) -> tl.tensor:
    """An int64 that orders like (score, -id): floats order like their bits, negative ones once
    these are turned round. The two zeros are one."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ _NO_ID, bits)
    return (ordered.to(tl.int64) << 32) | (draft_id ^ _NO_ID).to(tl.int64)


@device_kernel
def _token(
    key: tl.tensor,
    ids: tl.tensor,
    MAPPED: tl.constexpr,  # noqa: N803
) -> tl.tensor:
    """The token id of a key, -1 where its score is no usable maximum."""
    ordered = (key >> 32).to(tl.int32)
    score = tl.where(ordered < 0, ordered ^ _NO_ID, ordered).to(tl.float32, bitcast=True)
    usable = (score > float("-inf")) & (score < float("inf"))
    token = (key & _NO_ID).to(tl.int32) ^ _NO_ID
    if MAPPED:
        token = tl.load(ids + token, mask=usable, other=-1)
    return tl.where(usable, token, -1)


@device_kernel
def _legal(
    row: tl.tensor,
    token: tl.tensor,
    inside: tl.tensor,
    words: tl.tensor,
    mask_of_row: tl.tensor,
    word_count: tl.tensor,
) -> tl.tensor:
    """``inside`` [rows, ids] without the tokens that the mask of a row forbids."""
    if word_count > 0:
        mask_row = tl.load(mask_of_row + row, mask=row >= 0, other=-1)[:, None]
        word = (token >> 5)[None, :]
        # Words past the end read as 0: those ids are illegal.
        bits = tl.load(
            words + mask_row.to(tl.int64) * word_count + word,
            mask=inside & (mask_row >= 0) & (word < word_count),
            other=0,
        )
        inside = inside & ((mask_row < 0) | (((bits >> (token & 31)[None, :]) & 1) != 0))
    return inside


@kernel_of_varying("word_count", "requests", "k")
def _slot(
    keys: tl.tensor,
    anchors: tl.tensor,
    ids: tl.tensor,
    base: tl.tensor,
    w1: tl.tensor,
    w2: tl.tensor,
    words: tl.tensor,
    mask_of_row: tl.tensor,
    word_count: tl.tensor,
    requests: tl.tensor,
    drafts: tl.tensor,
    k: tl.tensor,
    size: tl.tensor,
    MAPPED: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
    STEP: tl.constexpr,  # noqa: N803
    UPCAST: tl.constexpr,  # noqa: N803
) -> None:
    """Raise ``keys`` [B, g] of slot k to the best of this program's draft ids."""
    b = tl.program_id(1) * TILE + tl.arange(0, TILE)
    is_request = b < requests
    row = b.to(tl.int64) * size + k
    previous = tl.load(anchors + b, mask=is_request, other=-1)
    if k > 0:
        key = tl.load(keys + row - 1, mask=is_request, other=_NO_KEY)
        previous = _token(key, ids, MAPPED)
    alive = previous >= 0
    draft_id = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_draft = draft_id < drafts
    bias = tl.zeros((TILE, BLOCK), tl.float32)
    for step in range(0, WIDTH, STEP):
        column = step + tl.arange(0, STEP)
        inside = column < WIDTH
        latent = tl.load(
            w1 + previous.to(tl.int64)[:, None] * WIDTH + column[None, :],
            mask=alive[:, None] & inside[None, :],
            other=0.0,
        )
        weight = tl.load(
            w2 + draft_id.to(tl.int64)[None, :] * WIDTH + column[:, None],
            mask=is_draft[None, :] & inside[:, None],
            other=0.0,
        )
        bias += product(latent, weight, UPCAST)
    token = draft_id
    if MAPPED:
        token = tl.load(ids + draft_id, mask=is_draft, other=0)
    inside = alive[:, None] & is_draft[None, :]
    inside = _legal(tl.where(alive, row, -1), token, inside, words, mask_of_row, word_count)
    at = base + row[:, None] * drafts + draft_id[None, :]
    score = tl.load(at, mask=inside, other=float("-inf")).to(tl.float32) + bias
    score = tl.where(score == score, score, float("inf"))  # a NaN is no usable maximum either
    score = tl.where(inside, score, float("-inf"))
    top = tl.max(score, axis=1)
    top_id = tl.min(tl.where(score == top[:, None], draft_id[None, :], _NO_ID), axis=1)
    tl.atomic_max(keys + row, _key(top, top_id), mask=alive)


@kernel_of_varying("slots")
def _settle(
    keys: tl.tensor,
    anchors: tl.tensor,
    ids: tl.tensor,
    tokens: tl.tensor,
    slots: tl.tensor,
    MAPPED: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
) -> None:
    """``tokens`` [B, g] of all keys."""
    slot = tl.program_id(0) * TILE + tl.arange(0, TILE)
    key = tl.load(keys + slot, mask=slot < slots, other=_NO_KEY)
    tl.store(tokens + slot, _token(key, ids, MAPPED), mask=slot < slots)
