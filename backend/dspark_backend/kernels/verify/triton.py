"""The verifier on the device: four launches, no synchronisation, no decision of the host.

1. ``_scan``, one program a row and block of the vocabulary: the block's best token, by logit or by
   logit + noise, and its sum of exponentials. The one pass over all logits.
2. ``_walk``, one program a request: from row to row until a draft falls.
3. ``_resample`` and ``_settle``: a sample of (p - q)+, or of p, for one row of each request that is
   verified by rejection; programs of other requests leave at once.

A row's result depends on that row alone: blocks are of fixed size and are combined in one order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dspark_backend.kernels.contract import mask_arguments
from dspark_backend.kernels.device import device_kernel, kernel_of_varying
from dspark_backend.kernels.verify.contract import Batch, Rule, Stream, Verdict
from dspark_backend.kernels.verify.noise import gumbel, row_keys, uniform

BLOCK = 4096
"""Token ids that a program looks at."""

_GREEDY = tl.constexpr(int(Rule.GREEDY))
_COUPLED = tl.constexpr(int(Rule.COUPLED))
_REJECTION = tl.constexpr(int(Rule.REJECTION))
_TARGET = tl.constexpr(int(Stream.TARGET))
_ACCEPT = tl.constexpr(int(Stream.ACCEPT))
_RESIDUAL = tl.constexpr(int(Stream.RESIDUAL))
_NO_ID = tl.constexpr(0x7FFFFFFF)  # above every token id


def verify(batch: Batch, *, block: int = BLOCK) -> Verdict:
    """Judge the drafts of all requests of ``batch``, on the device where its tensors are.

    ``block``, a power of two, is how much of the vocabulary a program reads. Greedy and coupled
    verdicts do not depend on it; a ratio test does where float32 cannot tell its sides apart.
    Allocates scratch of 16 bytes for each row and block, and 32 for each request and block.
    """
    rows, vocab = batch.logits.shape
    requests, blocks = batch.requests, triton.cdiv(vocab, block)
    verdict = Verdict(*(_scratch(batch, torch.int32, requests) for _ in range(2)))
    if requests == 0:
        return verdict
    best = _scratch(batch, torch.float64, rows, blocks)
    best_id = _scratch(batch, torch.int32, rows, blocks)
    mass = _scratch(batch, torch.float32, rows, blocks)
    request = (batch.offsets, batch.rules, batch.temperatures, batch.seeds, batch.positions)
    row = (batch.logits, batch.logits.stride(0), vocab, *mask_arguments(batch.masks, batch.drafts))
    _scan[(requests * batch.longest, blocks)](
        *request, *row, best, best_id, mass, batch.longest, BLOCK=block
    )
    combined = triton.next_power_of_2(blocks)
    open_row = _scratch(batch, torch.int32, requests)
    peak_and_mass = _scratch(batch, torch.float64, requests, 2)
    q = _q_arguments(batch)
    _walk[(requests,)](
        *request,
        *row,
        batch.drafts,
        *q,
        best,
        best_id,
        mass,
        *(verdict.accepted, verdict.tokens, open_row, peak_and_mass),
        blocks,
        COMBINED=combined,
    )
    scores = _scratch(batch, torch.float64, 2, requests, blocks)
    ids = _scratch(batch, torch.int32, 2, requests, blocks)
    _resample[(requests, blocks)](
        *request, *row, batch.drafts, *q, open_row, peak_and_mass, scores, ids, BLOCK=block
    )
    _settle[(requests,)](open_row, scores, ids, verdict.tokens, blocks, COMBINED=combined)
    return verdict


def _scratch(batch: Batch, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=batch.logits.device)


def _q_arguments(batch: Batch) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """q, row of q, columns, columns a row (0: every draft is certain), 1 if mapped."""
    if batch.q is None:
        return batch.temperatures, batch.drafts, batch.drafts, 0, 0
    columns = batch.q.columns
    mapped = batch.drafts if columns is None else columns
    return batch.q.q, batch.q.of_row, mapped, batch.q.q.shape[1], int(columns is not None)


@device_kernel
def _scores(
    ids: tl.tensor,
    row: tl.tensor,
    temperature: tl.tensor,
    logits: tl.tensor,
    stride: tl.tensor,
    vocab: tl.tensor,
    words: tl.tensor,
    mask_of_row: tl.tensor,
    word_count: tl.tensor,
) -> tl.tensor:
    """The row's logits over the temperature at ``ids``, float32; -inf where the grammar forbids and
    outside the vocabulary, +inf for a NaN (neither is a usable maximum)."""
    inside = (ids >= 0) & (ids < vocab)
    if word_count > 0:
        mask_row = tl.load(mask_of_row + row)
        if mask_row >= 0:
            word = ids >> 5
            # Words past the end read as 0: those ids are illegal.
            bits = tl.load(
                words + mask_row.to(tl.int64) * word_count + word,
                mask=inside & (word < word_count),
                other=0,
            )
            inside = inside & (((bits >> (ids & 31)) & 1) != 0)
    at = logits + row.to(tl.int64) * stride + ids
    x = tl.load(at, mask=inside, other=float("-inf")).to(tl.float32)
    x = tl.where(x == x, x, float("inf"))
    return tl.div_rn(x, tl.zeros_like(x) + temperature)  # as numpy divides: correctly rounded


@device_kernel
def _best(scores: tl.tensor, ids: tl.tensor) -> tl.tensor:
    """The largest score and its id, the lowest among equals."""
    top = tl.max(scores, axis=0)
    return top, tl.min(tl.where(scores == top, ids, _NO_ID), axis=0)


@device_kernel
def _temperature(rule: tl.tensor, temperatures: tl.tensor, b: tl.tensor) -> tl.tensor:
    """The request's temperature, 1 where it is greedy: x / 1 is x."""
    return tl.where(rule == _GREEDY, 1.0, tl.load(temperatures + b))


@kernel_of_varying("word_count", "longest")
def _scan(
    offsets: tl.tensor,
    rules: tl.tensor,
    temperatures: tl.tensor,
    seeds: tl.tensor,
    positions: tl.tensor,
    logits: tl.tensor,
    stride: tl.tensor,
    vocab: tl.tensor,
    words: tl.tensor,
    mask_of_row: tl.tensor,
    word_count: tl.tensor,
    best: tl.tensor,
    best_id: tl.tensor,
    mass: tl.tensor,
    longest: tl.tensor,
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    """``best`` float64, ``best_id`` int32, ``mass`` float32 [R, blocks] of every row."""
    b, k = tl.program_id(0) // longest, tl.program_id(0) % longest
    row = tl.load(offsets + b) + k
    if row < tl.load(offsets + b + 1):
        rule = tl.load(rules + b)
        ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        temperature = _temperature(rule, temperatures, b)
        x = _scores(ids, row, temperature, logits, stride, vocab, words, mask_of_row, word_count)
        top, top_id = _best(x, ids)
        score = top.to(tl.float64)
        out = row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        if rule == _COUPLED:
            coarse, fine = row_keys(tl.load(seeds + b), _TARGET, tl.load(positions + b) + k)
            noisy = x.to(tl.float64) + gumbel(ids.to(tl.uint32), coarse, fine)
            score, top_id = _best(noisy, ids)
        if rule == _REJECTION:
            # Halves cannot overflow, and inf - inf does not arise: such a block is not usable.
            base = tl.where((top > float("-inf")) & (top < float("inf")), top, 0.0)
            above = 2.0 * tl.minimum(tl.maximum(0.5 * x - 0.5 * base, -100.0), 0.0)
            share = tl.where(x > float("-inf"), tl.exp(above), 0.0)
            tl.store(mass + out, tl.sum(share, axis=0))
        tl.store(best + out, score)
        tl.store(best_id + out, top_id)


@device_kernel
def _q_at(
    ids: tl.tensor,
    row: tl.tensor,
    draft: tl.tensor,
    vocab: tl.tensor,
    q: tl.tensor,
    q_of_row: tl.tensor,
    columns: tl.tensor,
    column_count: tl.tensor,
    is_mapped: tl.tensor,
) -> tl.tensor:
    """q' of ``ids``, float64: one-hot at the draft where the row has no probabilities."""
    value = (ids == draft).to(tl.float64)
    if column_count > 0:
        q_row = tl.load(q_of_row + row)
        if q_row >= 0:
            inside = (ids >= 0) & (ids < vocab)
            column = ids
            if is_mapped != 0:
                column = tl.load(columns + ids, mask=inside, other=-1)
            at = q + q_row.to(tl.int64) * column_count + column
            value = tl.load(at, mask=inside & (column >= 0), other=0.0).to(tl.float64)
    return value


@kernel_of_varying("word_count", "column_count", "is_mapped")
def _walk(
    offsets: tl.tensor,
    rules: tl.tensor,
    temperatures: tl.tensor,
    seeds: tl.tensor,
    positions: tl.tensor,
    logits: tl.tensor,
    stride: tl.tensor,
    vocab: tl.tensor,
    words: tl.tensor,
    mask_of_row: tl.tensor,
    word_count: tl.tensor,
    drafts: tl.tensor,
    q: tl.tensor,
    q_of_row: tl.tensor,
    columns: tl.tensor,
    column_count: tl.tensor,
    is_mapped: tl.tensor,
    best: tl.tensor,
    best_id: tl.tensor,
    mass: tl.tensor,
    accepted: tl.tensor,
    tokens: tl.tensor,
    open_row: tl.tensor,
    peak_and_mass: tl.tensor,
    blocks: tl.tensor,
    COMBINED: tl.constexpr,  # noqa: N803
) -> None:
    """``accepted`` of every request, ``tokens`` of all but those that a sample has yet to settle:
    ``open_row`` is the row to sample, -1 for none, ``peak_and_mass`` [B, 2] its softmax's."""
    b = tl.program_id(0)
    first, end = tl.load(offsets + b), tl.load(offsets + b + 1)
    rule, seed, position = tl.load(rules + b), tl.load(seeds + b), tl.load(positions + b)
    temperature = _temperature(rule, temperatures, b)
    block = tl.arange(0, COMBINED)
    row, walking = first, first < end
    token, open_ = tl.full((), -1, tl.int32), tl.full((), -1, tl.int32)
    peak, total = tl.full((), 0.0, tl.float64), tl.full((), 1.0, tl.float64)
    while walking:
        at = row.to(tl.int64) * blocks + block
        score = tl.load(best + at, mask=block < blocks, other=float("-inf"))
        ids = tl.load(best_id + at, mask=block < blocks, other=_NO_ID)
        top, choice = _best(score, ids)
        usable = (top > float("-inf")) & (top < float("inf"))
        token = tl.where(usable, choice, -1)
        draft = tl.load(drafts + row)
        stands = usable & (draft == token)
        if rule == _REJECTION:
            part = tl.load(mass + at, mask=block < blocks, other=0.0).to(tl.float64)
            peak = tl.where(usable, top, 0.0)
            share = part * tl.exp(tl.minimum(score - peak, 0.0))
            total = tl.where(usable, tl.sum(share, axis=0), 1.0)
            x = _scores(
                draft, row, temperature, logits, stride, vocab, words, mask_of_row, word_count
            )
            p_draft = tl.exp(tl.minimum(x.to(tl.float64) - peak, 0.0)) / total
            q_draft = _q_at(draft, row, draft, vocab, q, q_of_row, columns, column_count, is_mapped)
            coarse, fine = row_keys(seed, _ACCEPT, position + (row - first))
            w = uniform(tl.zeros_like(draft).to(tl.uint32), coarse, fine)
            stands = usable & (w * q_draft < p_draft)
            open_ = tl.where(usable, row, -1)
        walking = stands & (row + 1 < end)
        row = tl.where(walking, row + 1, row)
    tl.store(accepted + b, row - first)
    tl.store(tokens + b, token)
    tl.store(open_row + b, open_)
    tl.store(peak_and_mass + 2 * b, peak)
    tl.store(peak_and_mass + 2 * b + 1, total)


@kernel_of_varying("word_count", "column_count", "is_mapped")
def _resample(
    offsets: tl.tensor,
    rules: tl.tensor,
    temperatures: tl.tensor,
    seeds: tl.tensor,
    positions: tl.tensor,
    logits: tl.tensor,
    stride: tl.tensor,
    vocab: tl.tensor,
    words: tl.tensor,
    mask_of_row: tl.tensor,
    word_count: tl.tensor,
    drafts: tl.tensor,
    q: tl.tensor,
    q_of_row: tl.tensor,
    columns: tl.tensor,
    column_count: tl.tensor,
    is_mapped: tl.tensor,
    open_row: tl.tensor,
    peak_and_mass: tl.tensor,
    scores: tl.tensor,
    best_id: tl.tensor,
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    """Gumbel-max over (p - q)+ and over p: ``scores`` float64, ``best_id`` int32 [2, B, blocks]."""
    b = tl.program_id(0)
    row = tl.load(open_row + b)
    if row >= 0:
        rule, first = tl.load(rules + b), tl.load(offsets + b)
        ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        x = _scores(
            ids,
            row,
            _temperature(rule, temperatures, b),
            logits,
            stride,
            vocab,
            words,
            mask_of_row,
            word_count,
        )
        peak, total = tl.load(peak_and_mass + 2 * b), tl.load(peak_and_mass + 2 * b + 1)
        p = tl.exp(x.to(tl.float64) - peak) / total
        residual = p
        if row + 1 < tl.load(offsets + b + 1):  # a draft fell here; the bonus row judged none
            draft = tl.load(drafts + row)
            residual = p - _q_at(
                ids, row, draft, vocab, q, q_of_row, columns, column_count, is_mapped
            )
        coarse, fine = row_keys(
            tl.load(seeds + b), _RESIDUAL, tl.load(positions + b) + (row - first)
        )
        noise = gumbel(ids.to(tl.uint32), coarse, fine)
        out = b.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        plane = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
        _race(residual, noise, ids, scores + out, best_id + out)
        _race(p, noise, ids, scores + plane + out, best_id + plane + out)


@device_kernel
def _race(
    weight: tl.tensor, noise: tl.tensor, ids: tl.tensor, score: tl.tensor, winner: tl.tensor
) -> None:
    """Store the best of ``log weight + noise``; -inf where no weight is positive."""
    is_in = weight > 0.0
    log_weight = tl.log(tl.where(is_in, weight, 1.0))
    top, top_id = _best(tl.where(is_in, log_weight + noise, float("-inf")), ids)
    tl.store(score, top)
    tl.store(winner, top_id)


@device_kernel
def _settle(
    open_row: tl.tensor,
    scores: tl.tensor,
    best_id: tl.tensor,
    tokens: tl.tensor,
    blocks: tl.tensor,
    COMBINED: tl.constexpr,  # noqa: N803
) -> None:
    """The winner over (p - q)+. Where that has no mass p = q but for rounding, and p is its limit:
    the winner over p."""
    b = tl.program_id(0)
    if tl.load(open_row + b) >= 0:
        block = tl.arange(0, COMBINED)
        at, inside = b.to(tl.int64) * blocks + block, block < blocks
        plane = tl.num_programs(0).to(tl.int64) * blocks
        residual = tl.load(scores + at, mask=inside, other=float("-inf"))
        top, token = _best(residual, tl.load(best_id + at, mask=inside, other=_NO_ID))
        if top == float("-inf"):
            p = tl.load(scores + plane + at, mask=inside, other=float("-inf"))
            ids = tl.load(best_id + plane + at, mask=inside, other=_NO_ID)
            top, token = _best(p, ids)
        tl.store(tokens + b, token)
