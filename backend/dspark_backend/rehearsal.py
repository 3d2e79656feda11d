"""Passes and drafts to run before there is work for them: to time them, and to compile kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from dspark_backend.kernels import jit
from dspark_backend.kv.budget import KVShape
from dspark_backend.kv.sequence import KV
from dspark_backend.speculation import suffix
from dspark_backend.speculation.protocol import Anchor, Drafter
from dspark_backend.target.batch import Batch, Rows
from dspark_backend.target.protocol import Target

Task = Callable[[], object]

_MANY = 64  # rows: products of few and of many are different kernels
# Storage hands positions out in grains or pages, none of which is longer.
_GRAIN = 256


def compile_kernels(target: Target, drafter: Drafter | None, threads: int) -> None:
    """Run once what a step may run, on ``threads`` threads, so that none of it compiles in a step:
    in a new environment that took seconds, and from the disk it takes some hundredths of one."""
    taps = () if drafter is None else tuple(drafter.taps)
    rows = min(_MANY, target.max_positions)
    (kv,) = sequences(target, [rows])
    with jit.threads(threads):
        target.forward(Batch([Rows(kv, [_token(0, target)], 1)]), taps)
        tokens = [_token(number, target) for number in range(rows)]
        features = target.forward(Batch([Rows(kv, tokens, rows)]), taps).features
        if drafter is not None:
            (anchor,) = drafting(drafter, target, 1, rows)
            anchor.context.length = 0
            drafter.extend(anchor.context, features)
            drafter.propose([anchor])
        target.wait()
    suffix.warm()


def sequences(target: Target, capacities: Sequence[int], draft: KVShape | None = None) -> list[KV]:
    """Sequences with room for so many positions, all written to, on a budget of their own;
    ``draft`` is the shape of a drafter's context, where they are to have one.

    Memory that nobody wrote to is one shared page of zeros, and faster than any real sequence.
    """
    position = target.kv_shape.bytes_per_token + (draft.bytes_per_token if draft else 0)
    room = sum(capacity + _GRAIN for capacity in capacities) * position
    storage = target.storage(draft, room)
    made = []
    for capacity in capacities:
        kv = storage.new()
        kv.reserve(capacity)
        kv.fill(0.02)
        made.append(kv)
    return made


def verifying(
    target: Target,
    taps: Sequence[int],
    sequences: Sequence[KV],
    rows: int,
    context: int,
) -> Task:
    """A pass of ``rows`` rows of each sequence after its first ``context`` positions, with the
    logits of all rows, as verification wants them."""
    tokens = [_token(number, target) for number in range(rows)]

    def run() -> None:
        for kv in sequences:
            kv.length = context
        target.forward(Batch([Rows(kv, tokens, rows) for kv in sequences]), taps)
        target.wait()

    return run


def drafting(drafter: Drafter, target: Target, anchors: int, context: int) -> list[Anchor]:
    """Where ``anchors`` blocks start, each after ``context`` positions of its own."""
    shape = drafter.context_shape
    made = []
    for number, kv in enumerate(sequences(target, [context + drafter.block_size] * anchors, shape)):
        if kv.draft is None:
            raise ValueError("the target's storage makes no contexts for this drafter")
        kv.length = kv.draft.length = context
        made.append(Anchor(kv.draft, _token(number, target)))
    return made


def features_of(target: Target, taps: Sequence[int], count: int) -> Tensor:
    """Features of ``count`` tokens, where the target has them."""
    (kv,) = sequences(target, [count])
    tokens = [_token(number, target) for number in range(count)]
    return target.forward(Batch([Rows(kv, tokens, 0)]), taps).features


def catching_up(drafter: Drafter, anchors: Sequence[Anchor], features: Tensor) -> Task:
    """A call of the drafter for ``anchors`` after each of their contexts has read ``features``
    [n, len(taps) * d] of the tokens that were committed since the last, as in a cycle."""
    lengths = [anchor.context.length - len(features) for anchor in anchors]

    def run() -> None:
        for anchor, length in zip(anchors, lengths, strict=True):
            anchor.context.length = length
            drafter.extend(anchor.context, features)
        drafter.propose(anchors)

    return run


def _token(number: int, target: Target) -> int:
    return (7919 * number + 1) % target.config.vocab_size
