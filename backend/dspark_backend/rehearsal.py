"""Passes and drafts to run before there is work for them: to time them, and to compile kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from dspark_backend.kernels import jit
from dspark_backend.kv.budget import KVShape
from dspark_backend.kv.sequence import KV
from dspark_backend.request import AcceptanceRule, SamplingParams
from dspark_backend.sampling.sampler import Sampler
from dspark_backend.sampling.verifier import Question, Verifier
from dspark_backend.speculation import suffix
from dspark_backend.speculation.distribution import Distribution
from dspark_backend.speculation.guide import ChainGuide, Likeliest
from dspark_backend.speculation.protocol import Anchor, Drafter
from dspark_backend.target.batch import Batch, Rows
from dspark_backend.target.protocol import Target

Task = Callable[[], object]

_MANY = 64  # rows: products of few and of many are different kernels
# Storage hands positions out in grains or pages, none of which is longer.
_GRAIN = 256


def compile_kernels(
    target: Target, drafter: Drafter | None, verifier: Verifier, threads: int
) -> None:
    """Run once what a step may run, on ``threads`` threads, so that none of it compiles in a step:
    in a new environment that took seconds, and from the disk it takes some hundredths of one."""
    taps = () if drafter is None else tuple(drafter.taps)
    rows = min(_MANY, target.max_positions)
    (kv,) = sequences(target, [rows])
    with jit.threads(threads):
        logits = target.forward(Batch([Rows(kv, [_token(0, target)], 1)]), taps).logits
        tokens = [_token(number, target) for number in range(rows)]
        features = target.forward(Batch([Rows(kv, tokens, rows)]), taps).features
        for questions in _questions(target):
            rows_asked = sum(question.rows for question in questions)
            # No logits of the model: where its weights are damaged, its steps say so.
            for answer in verifier.ask(logits.new_zeros(rows_asked, logits.shape[1]), questions):
                answer()
        if drafter is not None:
            (anchor,) = drafting(drafter, target, 1, rows)
            anchor.context.length = 0
            drafter.extend(anchor.context, features)
            drafter.propose([anchor])
            # Slot by slot, and with somebody who decides: other kernels, or other work of torch.
            guide = ChainGuide(None, drafter.block_size, Likeliest())
            known = (anchor.token,)[: drafter.block_size - 1]  # a slot is left to draft
            drafter.propose([replace(anchor, known=known), replace(anchor, guide=guide)])
        target.wait()
    suffix.warm()


def _questions(target: Target) -> Iterator[list[Question]]:
    """What a verifier may be asked of one pass, such that no two need the same kernels: with and
    without probabilities of drafts, of logits as they are and of rewritten ones."""
    draft = _token(0, target)
    drawn = Distribution(np.array([draft], np.uint32), np.ones(1))
    plain = SamplingParams(temperature=0.8)
    cut = replace(plain, top_k=5, top_p=0.9, min_p=0.01, repetition_penalty=1.1)
    for params in (plain, cut):
        rejecting = replace(params, acceptance=AcceptanceRule.REJECTION)
        for last in ((), (drawn,)):
            rules = ((SamplingParams(), ()), (params, ()), (rejecting, last))
            yield [
                Question(
                    Sampler(rule, [draft], target.config.vocab_size), (draft,), distributions=q
                )
                for rule, q in rules
            ]


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
