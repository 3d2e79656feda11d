"""Passes and drafts to run before there is work for them: to time them, and to compile kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from dspark_backend.kernels import jit
from dspark_backend.kv.contiguous import KVBudget, KVShape, SequenceKV
from dspark_backend.speculation import suffix
from dspark_backend.speculation.protocol import Anchor, Drafter
from dspark_backend.target.batch import Batch, Rows
from dspark_backend.target.decoder import Decoder

Task = Callable[[], object]

_MANY = 64  # rows: products of few and of many are different kernels


def compile_kernels(decoder: Decoder, drafter: Drafter | None, threads: int) -> None:
    """Run once what a step may run, on ``threads`` threads, so that none of it compiles in a step:
    in a new environment that took seconds, and from the disk it takes some hundredths of one."""
    taps = () if drafter is None else tuple(drafter.taps)
    rows = min(_MANY, decoder.max_positions)
    kv = sequence(decoder.kv_shape, rows)
    with jit.threads(threads):
        decoder.forward(Batch([Rows(kv, [_token(0, decoder)], 1)]), taps)
        tokens = [_token(number, decoder) for number in range(rows)]
        features = decoder.forward(Batch([Rows(kv, tokens, rows)]), taps).features
        if drafter is not None:
            (anchor,) = drafting(drafter, decoder, 1, rows)
            anchor.context.length = 0
            drafter.extend(anchor.context, features)
            drafter.propose([anchor])
    suffix.warm()


def sequence(shape: KVShape, capacity: int) -> SequenceKV:
    """A sequence with room for ``capacity`` positions, all written to; it counts on no budget.

    Memory that nobody wrote to is one shared page of zeros, and faster than any real sequence.
    """
    kv = SequenceKV(shape, KVBudget(2**62))
    kv.reserve(capacity)
    kv.keys.fill(0.02)
    kv.values.fill(0.02)
    return kv


def verifying(
    decoder: Decoder,
    taps: Sequence[int],
    sequences: Sequence[SequenceKV],
    rows: int,
    context: int,
) -> Task:
    """A pass of ``rows`` rows of each sequence after its first ``context`` positions, with the
    logits of all rows, as verification wants them."""
    tokens = [_token(number, decoder) for number in range(rows)]

    def run() -> None:
        for kv in sequences:
            kv.length = context
        decoder.forward(Batch([Rows(kv, tokens, rows) for kv in sequences]), taps)

    return run


def drafting(drafter: Drafter, decoder: Decoder, anchors: int, context: int) -> list[Anchor]:
    """Where ``anchors`` blocks start, each after ``context`` positions of its own."""
    made = []
    for number in range(anchors):
        kv = sequence(drafter.context_shape, context + drafter.block_size)
        kv.length = context
        made.append(Anchor(kv, _token(number, decoder)))
    return made


def catching_up(drafter: Drafter, anchors: Sequence[Anchor], features: NDArray[np.float32]) -> Task:
    """A call of the drafter for ``anchors`` after each of their contexts has read ``features``
    [n, len(taps) * d] of the tokens that were committed since the last, as in a cycle."""
    lengths = [anchor.context.length - len(features) for anchor in anchors]

    def run() -> None:
        for anchor, length in zip(anchors, lengths, strict=True):
            anchor.context.length = length
            drafter.extend(anchor.context, features)
        drafter.propose(anchors)

    return run


def _token(number: int, decoder: Decoder) -> int:
    return (7919 * number + 1) % decoder.config.vocab_size
