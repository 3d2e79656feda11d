"""Measures what the parts of a cycle cost here: a second or two at load, by running them.

In the thread that computes and nowhere else: a thread that ever ran a product keeps an OpenMP team
of its own, and two teams on the same cores ruin every pass (see ``Engine.load``).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch

from dspark_backend.kernels import jit
from dspark_backend.rehearsal import Task, catching_up, drafting, features_of, sequences, verifying
from dspark_backend.speculation.cost import CostModel
from dspark_backend.speculation.cost_store import keep, read_kept
from dspark_backend.speculation.cost_table import Conditions, CostTable
from dspark_backend.speculation.protocol import Drafter
from dspark_backend.target.protocol import Target

_log = logging.getLogger(__name__)

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
ANCHORS = (1, 2, 4, 8, 16)
CONTEXT = 256
"""Positions that the passes of the table attend to: the usual order of an agent's session, so that
the slopes only bridge what is left."""
LONG_CONTEXT = 2048
COMMITTED = 2
"""Tokens that a cycle is taken to commit, whose features the drafter reads before the next: with
fewer than that drafting hardly ever pays."""
BUDGET_S = 2.0
_FEW = 8
_ROUNDS = 12
_KV_BYTES = 96 * 2**20  # for the long sequence: bounds the memory and the time to fill it
_LEAST_SPAN = 64  # positions: a shorter difference of contexts is lost in the noise

Clock = Callable[[], float]


def kept_or_measured(decoder: Target, drafter: Drafter | None, conditions: Conditions) -> CostModel:
    """The cost model for ``conditions``, measured now if there is none yet, and kept unless
    something else ran meanwhile."""
    table = read_kept(conditions)
    if table is None:
        table = measure(decoder, drafter, conditions.threads, conditions=conditions)
        if table.disturbed:
            # Good enough to begin with, and corrected by every cycle; the next load measures again.
            _log.warning("something else ran while the cost of a cycle was measured: not kept")
            return CostModel(table.undisturbed())
        keep(table)
    return CostModel(table)


def measure(
    decoder: Target,
    drafter: Drafter | None,
    threads: int,
    *,
    conditions: Conditions | None = None,
    budget_s: float = BUDGET_S,
    clock: Clock = time.perf_counter,
) -> CostTable:
    """Time passes of ``decoder`` and calls of ``drafter`` on ``threads`` threads.

    ``budget_s`` bounds the repetitions, see :func:`repeated`. Other engines of the
    process go on meanwhile, one pass at a time.
    """
    shape = _Shape.of(decoder)
    few, context, long = shape.few, shape.context, shape.long
    taps = () if drafter is None else tuple(drafter.taps)
    capacity = max(long + few, context + shape.rows[-1])
    several = sequences(decoder, [capacity, *[context + 1] * (few - 1)])
    one = several[:1]
    tasks = {f"rows {n}": verifying(decoder, taps, one, n, context) for n in shape.rows}
    tasks["requests"] = verifying(decoder, taps, several, 1, context)
    if long:
        tasks["long 1"] = verifying(decoder, taps, one, 1, long)
        tasks[f"long {few}"] = verifying(decoder, taps, one, few, long)
    if drafter is not None:
        anchors = drafting(drafter, decoder, ANCHORS[-1], context)
        features = features_of(decoder, taps, min(COMMITTED, context))
        tasks |= {f"anchors {n}": catching_up(drafter, anchors[:n], features) for n in ANCHORS}
    seconds = timed(tasks, threads, budget_s, clock)

    position_s, pair_s = 0.0, 0.0
    if long:
        single = (seconds["long 1"] - seconds["rows 1"]) / (long - context)
        block = (seconds[f"long {few}"] - seconds[f"rows {few}"]) / (long - context)
        position_s, pair_s = attention_slopes(single, block, few)
    request_s = (seconds["requests"] - seconds[f"rows {few}"]) / max(few - 1, 1)
    return CostTable(
        conditions=conditions,
        context=context,
        rows=shape.rows,
        verify_s=tuple(seconds[f"rows {n}"] for n in shape.rows),
        request_s=max(0.0, request_s - position_s * context),
        position_s=position_s,
        pair_s=pair_s,
        anchors=() if drafter is None else ANCHORS,
        draft_s=() if drafter is None else tuple(seconds[f"anchors {n}"] for n in ANCHORS),
    )


def timed(
    tasks: Mapping[str, Task],
    threads: int,
    budget_s: float,
    clock: Clock = time.perf_counter,
) -> dict[str, float]:
    """Seconds of each task on ``threads`` threads of the caller's; see :func:`repeated`."""

    def once(task: Task) -> float:
        with jit.threads(threads):  # waiting for another engine's pass is no part of the task
            started = clock()
            task()
            return clock() - started

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            return repeated(tasks, once, budget_s, clock)
    finally:
        torch.set_num_threads(before)


def repeated(
    tasks: Mapping[str, Task], once: Callable[[Task], float], budget_s: float, clock: Clock
) -> dict[str, float]:
    """Seconds of each task: rounds of all of them while the budget lasts, so that a drift of the
    machine meets every task alike. It takes twice the budget at most, or one round where that alone
    is longer: no load waits for more, and cycles correct what so little could not show.

    Of each task the smaller of two medians, that of the first and that of the second half of the
    rounds. Whatever disturbs a measurement makes it longer, and comes in spells longer than a pass:
    one that spoils half of the rounds is left out. A plain minimum would rather find the luckiest
    pass than the usual one.
    """
    taken: dict[str, list[float]] = {name: [] for name in tasks}
    started = before = clock()
    for number in range(_ROUNDS):
        spent, last = clock() - started, clock() - before
        # A second round may run over, for what a first one pays once; a third one may not.
        if number and (spent if number == 1 else spent + last) > budget_s:
            break
        before = clock()
        for name, task in tasks.items():
            taken[name].append(once(task))
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


@dataclass(frozen=True, slots=True)
class _Shape:
    """What a model has room for: the table's ``rows`` and ``context``, ``few`` rows for the slopes,
    and a ``long`` context, 0 where none is long enough to differ measurably."""

    rows: tuple[int, ...]
    context: int
    few: int
    long: int

    @classmethod
    def of(cls, decoder: Target) -> _Shape:
        room = decoder.max_positions
        context = min(CONTEXT, room // 2)
        rows = tuple(n for n in ROWS if n <= room - context)
        few = max(n for n in rows if n <= _FEW)
        long = min(LONG_CONTEXT, room - few, _KV_BYTES // decoder.kv_shape.bytes_per_token)
        return cls(rows, context, few, long if long >= context + _LEAST_SPAN else 0)


def _usual(values: list[float]) -> float:
    half = len(values) // 2
    return min(median(part) for part in (values[:half], values[half:]) if part)
