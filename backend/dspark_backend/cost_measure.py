"""Measures what the parts of a cycle cost here: a second or two at load, by running them.

In the thread that computes and nowhere else: a thread that ever ran a product keeps an OpenMP team
of its own, and two teams on the same cores ruin every pass (see ``Engine.load``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from dspark_backend.kernels import jit
from dspark_backend.kv.contiguous import KVBudget, KVShape, SequenceKV
from dspark_backend.speculation.cost import CostModel
from dspark_backend.speculation.cost_store import keep, read_kept
from dspark_backend.speculation.cost_table import Conditions, CostTable
from dspark_backend.speculation.protocol import Anchor, Drafter
from dspark_backend.target.batch import Batch, Rows
from dspark_backend.target.decoder import Decoder

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
ANCHORS = (1, 2, 4, 8, 16)
CONTEXT = 256
"""Positions that the passes of the table attend to: the usual order of an agent's session, so that
the slopes only bridge what is left."""
LONG_CONTEXT = 2048
BUDGET_S = 2.0
_REQUESTS = 8
_ROUNDS = (2, 12)
_KV_BYTES = 96 * 2**20  # for the long sequence: bounds the memory and the time to fill it
_LEAST_SPAN = 64  # positions: a shorter difference of contexts is lost in the noise

Clock = Callable[[], float]
Task = Callable[[], object]


def kept_or_measured(
    decoder: Decoder, drafter: Drafter | None, conditions: Conditions
) -> CostModel:
    """The cost model for ``conditions``, measured and kept now if there is none yet."""
    table = read_kept(conditions)
    if table is None:
        table = measure(decoder, drafter, conditions.threads, conditions=conditions)
        keep(table)
    return CostModel(table)


def measure(
    decoder: Decoder,
    drafter: Drafter | None,
    threads: int,
    *,
    conditions: Conditions | None = None,
    budget_s: float = BUDGET_S,
    clock: Clock = time.perf_counter,
) -> CostTable:
    """Time passes of ``decoder`` and calls of ``drafter`` on ``threads`` threads.

    ``budget_s`` bounds the repetitions; every point is timed twice at least. Other engines of the
    process go on meanwhile, one pass at a time.
    """
    scene = _Scene.of(decoder, drafter)
    tasks: dict[str, Task] = {f"rows {n}": scene.passing(1, n) for n in scene.rows}
    few = scene.few
    tasks["requests"] = scene.passing(few, 1)
    if scene.long is not None:
        tasks["long 1"] = scene.passing(1, 1, scene.long)
        tasks[f"long {few}"] = scene.passing(1, few, scene.long)
    if drafter is not None:
        tasks |= {f"anchors {n}": partial(drafter.propose, scene.anchors[:n]) for n in ANCHORS}

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            seconds = repeated(tasks, partial(_timed, threads, clock), budget_s, clock)
    finally:
        torch.set_num_threads(before)

    position_s, pair_s = 0.0, 0.0
    if scene.long is not None:
        one = (seconds["long 1"] - seconds["rows 1"]) / scene.span
        several = (seconds[f"long {few}"] - seconds[f"rows {few}"]) / scene.span
        position_s, pair_s = attention_slopes(one, several, few)
    further = max(few - 1, 1)
    request_s = (seconds["requests"] - seconds[f"rows {few}"]) / further
    return CostTable(
        conditions=conditions,
        context=scene.context,
        rows=scene.rows,
        verify_s=tuple(seconds[f"rows {n}"] for n in scene.rows),
        request_s=max(0.0, request_s - position_s * scene.context),
        position_s=position_s,
        pair_s=pair_s,
        anchors=() if drafter is None else ANCHORS,
        draft_s=() if drafter is None else tuple(seconds[f"anchors {n}"] for n in ANCHORS),
    )


def repeated(
    tasks: Mapping[str, Task], timed: Callable[[Task], float], budget_s: float, clock: Clock
) -> dict[str, float]:
    """Seconds of each task: rounds of all of them while the budget lasts, so that a drift of the
    machine meets every task alike.

    Of each task the smaller of two medians, that of the first and that of the second half of the
    rounds. Whatever disturbs a measurement makes it longer, and comes in spells longer than a pass:
    one that spoils half of the rounds is left out. A plain minimum would rather find the luckiest
    pass than the usual one.
    """
    taken: dict[str, list[float]] = {name: [] for name in tasks}
    least, most = _ROUNDS
    started = before = clock()
    for number in range(most):
        spent, last = clock() - started, clock() - before
        if number >= least and spent + last > budget_s:
            break
        before = clock()
        for name, task in tasks.items():
            taken[name].append(timed(task))
    return {name: _usual(values) for name, values in taken.items()}


def attention_slopes(one: float, several: float, rows: int) -> tuple[float, float]:
    """Seconds a position and a (row, position) pair, from those that a further position costs a
    pass of one row (``one``) and of ``rows`` rows (``several``); neither is negative.

    ``one = position + pair`` and ``several = position + rows * pair``; where noise makes a part
    negative, that part is 0 and the other one the least-squares answer to both.
    """
    pair = (several - one) / (rows - 1) if rows > 1 else 0.0
    position = one - pair
    if pair < 0.0:
        return max(0.0, (one + several) / 2), 0.0
    if position < 0.0:
        return 0.0, max(0.0, (one + rows * several) / (1 + rows * rows))
    return position, pair


@dataclass(frozen=True)
class _Scene:
    """Sequences to run passes over, filled as in use: ``context`` positions in each of several, and
    a longer one (``long`` of its positions, None where the model has no room for a difference)."""

    decoder: Decoder
    taps: tuple[int, ...]
    rows: tuple[int, ...]
    context: int
    long: int | None
    sequences: tuple[SequenceKV, ...]
    anchors: tuple[Anchor, ...]

    @classmethod
    def of(cls, decoder: Decoder, drafter: Drafter | None) -> _Scene:
        room = decoder.max_positions
        context = min(CONTEXT, room // 2)
        rows = tuple(n for n in ROWS if n <= room - context)
        few = _few(rows)
        fits = _KV_BYTES // decoder.kv_shape.bytes_per_token
        long = min(LONG_CONTEXT, room - few, fits)
        if long < context + _LEAST_SPAN:
            long = 0
        longest = max(long + few, context + rows[-1])
        lengths = [longest] + [context + 1] * (few - 1)
        anchors: list[Anchor] = []
        if drafter is not None:
            for number in range(ANCHORS[-1]):
                draft = _filled(drafter.context_shape, context + drafter.block_size)
                draft.length = context
                anchors.append(Anchor(draft, _token(number, decoder)))
        return cls(
            decoder=decoder,
            taps=() if drafter is None else tuple(drafter.taps),
            rows=rows,
            context=context,
            long=long or None,
            sequences=tuple(_filled(decoder.kv_shape, length) for length in lengths),
            anchors=tuple(anchors),
        )

    @property
    def few(self) -> int:
        """How many rows the slopes are measured with."""
        return _few(self.rows)

    @property
    def span(self) -> int:
        """Positions between the table's context and the long one."""
        assert self.long is not None
        return self.long - self.context

    def passing(self, requests: int, rows: int, context: int | None = None) -> Task:
        """A pass of ``rows`` rows of each of the first ``requests`` sequences."""
        tokens = [_token(number, self.decoder) for number in range(rows)]

        def run() -> None:
            chosen = self.sequences[:requests]
            for kv in chosen:
                kv.length = self.context if context is None else context
            self.decoder.forward(Batch([Rows(kv, tokens, rows) for kv in chosen]), self.taps)

        return run


def _few(rows: tuple[int, ...]) -> int:
    return max(n for n in rows if n <= _REQUESTS)


def _filled(shape: KVShape, length: int) -> SequenceKV:
    kv = SequenceKV(shape, KVBudget(2**62))
    kv.reserve(length)
    # Memory that nobody wrote to is one shared page of zeros, and faster than any real sequence.
    kv.keys.fill(0.02)
    kv.values.fill(0.02)
    return kv


def _token(number: int, decoder: Decoder) -> int:
    return (7919 * number + 1) % decoder.config.vocab_size


def _timed(threads: int, clock: Clock, task: Task) -> float:
    with jit.threads(threads):  # waiting for another engine's pass is no part of the task
        started = clock()
        task()
        return clock() - started


def _usual(values: list[float]) -> float:
    half = len(values) // 2
    return min(median(values[:half]), median(values[half:]))
