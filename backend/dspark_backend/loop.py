"""The loop's iteration: schedule, propose, run the target, verify, commit."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from dspark_backend.admission import Admission
from dspark_backend.kernels import jit
from dspark_backend.kv.contiguous import SequenceKV
from dspark_backend.kv.pool import SequencePool
from dspark_backend.request import FinishReason
from dspark_backend.running import RunningStep
from dspark_backend.scheduler import Limits, plan, precedence
from dspark_backend.session import Session
from dspark_backend.speculation.budget import Budget
from dspark_backend.speculation.protocol import Anchor, Drafter
from dspark_backend.target.batch import Batch, Rows
from dspark_backend.target.decoder import Decoder, Pass
from dspark_backend.waiting import WaitingLine

_log = logging.getLogger(__name__)


class StepLoop:
    """Takes the steps of many sessions together, one pass of the target at a time.

    ``schedule`` and ``commit`` are for the holder of the engine's lock, ``run`` is not: nothing
    that it touches is anybody else's. A step that dies, dies alone.
    """

    def __init__(
        self,
        decoder: Decoder,
        pool: SequencePool,
        threads: int,
        limits: Limits,
        drafter: Drafter | None,
        budget: Budget | None,
        retire: Callable[[Session], None],
    ) -> None:
        """``budget`` is how much of a block is verified, the whole of it when left out; ``retire``
        takes a session that was closed while its step ran."""
        self.waiting: WaitingLine[RunningStep] = WaitingLine()
        self.running: list[RunningStep] = []
        self._decoder = decoder
        self._pool = pool
        self._threads = threads
        self._limits = limits
        self._drafter = drafter
        self._budget = budget or Budget(0 if drafter is None else drafter.block_size)
        self._admission = Admission(pool, 0 if drafter is None else drafter.block_size)
        self._retire = retire

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.running)

    def submit(self, step: RunningStep) -> None:
        """Queue ``step``."""
        self.waiting.add(step, step.request.urgency, step.due)

    def check_fits(self, positions: int) -> None:
        """Raises CapacityError when a step that ends with so many positions can never run."""
        self._admission.check_fits(positions)

    def schedule(self, live: Sequence[Session]) -> list[tuple[RunningStep, Rows]]:
        """Who takes part in the next pass, and with which tokens."""
        self._drop_cancelled()
        self._admit(live)
        for step in self.running:
            self._guarded(step, step.clear)
        self._sweep()
        self._draft()
        self._sweep()
        chosen = []
        order = [
            precedence(step.request.urgency, step.due, place)
            for place, step in enumerate(self.running)
        ]
        counts = plan([step.pending for step in self.running], self._limits, order)
        for step, count in zip(self.running, counts, strict=True):
            if not count:
                continue
            kv = step.session.kv
            self._guarded(step, partial(self._pool.reserve, kv, kv.length + count))
            if not step.finished:
                whole = count == step.pending and not step.is_prefill
                wanted = 1 + len(step.block.tokens) if whole else 0
                chosen.append((step, Rows(kv, step.rows(count), wanted)))
        self._sweep()
        return chosen

    def run(self, chosen: Sequence[tuple[RunningStep, Rows]]) -> tuple[Pass, float]:
        """One pass of the target over the chosen rows, and the seconds it took."""
        started = time.perf_counter()
        taps = () if self._drafter is None else self._drafter.taps
        with jit.threads(self._threads):
            result = self._decoder.forward(Batch([rows for _, rows in chosen]), taps)
        return result, time.perf_counter() - started

    def commit(
        self, chosen: Sequence[tuple[RunningStep, Rows]], result: Pass, seconds: float
    ) -> None:
        """Verify every step's block and commit what holds; the draft contexts follow the KV."""
        row = wanted = 0
        for step, rows in chosen:
            logits = result.logits[wanted : wanted + rows.logits]
            before = rows.kv.length
            self._guarded(step, partial(_verify, step, rows, logits, seconds))
            if rows.kv.draft is not None and not step.session.closed:
                features = result.features[row : row + rows.kv.length - before]
                self._guarded(step, partial(self._extend, step, rows.kv.draft, features))
            row += len(rows.tokens)
            wanted += rows.logits
        self._sweep()

    def fail(self, chosen: Sequence[tuple[RunningStep, Rows]], error: Exception) -> None:
        """The pass itself died: all that took part in it end with ``error``."""
        for step, _ in chosen:
            if not step.finished:
                step.fail(error)
        self._sweep()

    def _drop_cancelled(self) -> None:
        waiting = [step for step in self.waiting if step.cancelled]
        for step in waiting:
            self.waiting.remove(step)
        for step in (*waiting, *self.running):
            if step.cancelled:
                self._guarded(step, partial(step.finish, FinishReason.CANCELLED))
        self._sweep()

    def _admit(self, live: Sequence[Session]) -> None:
        """Admit who is next while there is room; nobody passes a step that waits for memory."""
        while len(self.running) < self._limits.running:
            step = self.waiting.next
            if step is None or not self._admission.make_room(step, live):
                return
            self.waiting.take()
            self._guarded(step, partial(self._start, step))
            if not step.finished:
                self.running.append(step)

    def _start(self, step: RunningStep) -> None:
        self._admission.fill(step)
        step.admit()
        step.begin()

    def _draft(self) -> None:
        """One call of the drafter for all the steps that can use a block."""
        steps = [step for step in self.running if step.draftable]
        if self._drafter is None or not steps or not self._budget.length:
            return
        started = time.perf_counter()
        for step in steps:
            self._guarded(step, partial(self._room_to_draft, step, self._drafter.block_size))
        steps = [step for step in steps if not step.finished]
        anchors = [Anchor(_context(step), step.session.log[-1]) for step in steps]
        if not anchors:
            return
        try:
            with jit.threads(self._threads):
                proposals = self._drafter.propose(anchors)
        except Exception:
            # Drafts only ever save time, so the steps go on without; nobody should miss why.
            _log.exception("the drafter failed: %d steps decode one token plainly", len(steps))
            return
        seconds = time.perf_counter() - started
        for step, proposal in zip(steps, proposals, strict=True):
            self._guarded(step, partial(step.propose, proposal, self._budget, seconds))

    def _room_to_draft(self, step: RunningStep, positions: int) -> None:
        """A block's own keys and values go past the end of its context."""
        context = _context(step)
        self._pool.reserve(context, context.length + positions)

    def _extend(
        self, step: RunningStep, context: SequenceKV, features: NDArray[np.float32]
    ) -> None:
        assert self._drafter is not None
        started = time.perf_counter()
        with jit.threads(self._threads):
            self._drafter.extend(context, features)
        if not step.finished:
            step.metrics.draft_s += time.perf_counter() - started

    def _guarded(self, step: RunningStep, work: Callable[[], None]) -> None:
        """Whatever a step dies of is that step's own error: its neighbours go on."""
        try:
            work()
        except Exception as error:
            if not step.finished:
                step.fail(error)
        if step.finished and step.session.closed and step.session.running is None:
            self._retire(step.session)

    def _sweep(self) -> None:
        self.running = [step for step in self.running if not step.finished]


def _context(step: RunningStep) -> SequenceKV:
    context = step.session.kv.draft
    assert context is not None, "every sequence of an engine with a drafter has a draft context"
    return context


def _verify(step: RunningStep, rows: Rows, logits: torch.Tensor, seconds: float) -> None:
    step.computed(len(rows.tokens), seconds)
    if rows.logits:
        step.advance(logits)
