"""The loop's iteration: schedule, propose, run the target, verify, commit."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from torch import Tensor

from dspark_backend.admission import Admission
from dspark_backend.beginning import Beginning, awaited
from dspark_backend.cycle import Cycle, Judged
from dspark_backend.draft_contexts import DraftContexts, context_of
from dspark_backend.kernels import jit
from dspark_backend.kv.pool import SequencePool
from dspark_backend.kv.sequence import KV
from dspark_backend.request import FinishReason
from dspark_backend.running import RunningStep
from dspark_backend.sampling.verifier import Answer, Verifier
from dspark_backend.scheduler import Limits, plan, precedence, weight
from dspark_backend.session import Session
from dspark_backend.speculation.arbiter import Arbiter, Decision
from dspark_backend.speculation.block import Offer
from dspark_backend.speculation.candidate import Candidate
from dspark_backend.speculation.copy import CopyProposer
from dspark_backend.speculation.copy_acceptance import CopyAcceptance
from dspark_backend.speculation.cost import CostModel
from dspark_backend.speculation.protocol import Drafter
from dspark_backend.target.batch import Batch, Rows
from dspark_backend.target.protocol import Target
from dspark_backend.waiting import WaitingLine

_log = logging.getLogger(__name__)


class StepLoop:
    """Takes the steps of many sessions together, one pass of the target at a time.

    A pass itself runs without the engine's lock: nothing that it touches is anybody else's. A step
    that dies, dies alone.
    """

    def __init__(
        self,
        target: Target,
        verifier: Verifier,
        pool: SequencePool,
        threads: int,
        limits: Limits,
        drafter: Drafter | None,
        arbiter: Arbiter,
        cost: CostModel | None,
        retire: Callable[[Session], None],
    ) -> None:
        """``cost`` learns from every cycle; ``retire`` takes a session that was closed while its
        step ran."""
        self.waiting: WaitingLine[RunningStep] = WaitingLine()
        self.running: list[RunningStep] = []
        # Out of the line, and next to be admitted once somebody has computed how they begin.
        self._following: dict[RunningStep, Beginning] = {}
        self._target = target
        self._verifier = verifier
        self._pool = pool
        self._threads = threads
        self._limits = limits
        self._drafter = drafter
        self._contexts = DraftContexts(drafter, pool, threads)
        self._arbiter = arbiter
        self._cost = cost
        self._copied = CopyAcceptance()
        self._cycle = Cycle()
        self._admission = Admission(pool, 0 if drafter is None else drafter.block_size)
        self._retire = retire

    @property
    def idle(self) -> bool:
        return not (self.waiting or self._following or self.running)

    @property
    def unfinished(self) -> list[RunningStep]:
        """All steps that were submitted and are not over."""
        return [*self.waiting, *self._following, *self.running]

    def submit(self, step: RunningStep) -> None:
        """Queue ``step``."""
        step.weight = weight(step.request.urgency)
        self.waiting.add(step, step.request.urgency, step.due)

    def check_fits(self, positions: int) -> None:
        """Raises CapacityError when a step that ends with so many positions can never run."""
        self._admission.check_fits(positions)

    def iterate(
        self, lock: AbstractContextManager[Any], live: Callable[[], Sequence[Session]]
    ) -> None:
        """One cycle. ``lock`` is the engine's, ``live`` tells its sessions to who holds it."""
        with lock:
            chosen = self._schedule(live())
        if not chosen:
            return
        try:
            judged, seconds = self._run(chosen)
        except Exception as error:
            with lock:
                self._fail(chosen, error)
            return
        with lock:
            self._commit(chosen, judged, seconds)

    def _schedule(self, live: Sequence[Session]) -> list[tuple[RunningStep, Rows]]:
        """Who takes part in the next pass, and with which tokens."""
        self._drop_cancelled()
        self._admit(live)
        for step in self.running:
            self._guarded(step, step.clear)
        self._sweep()
        self._cycle = Cycle()
        self._propose()
        self._sweep()
        self._budget()
        chosen = []
        order = [
            precedence(step.request.urgency, step.due, place)
            for place, step in enumerate(self.running)
        ]
        counts = plan([step.base_rows for step in self.running], self._limits, order)
        for step, committed in zip(self.running, counts, strict=True):
            if not committed:
                continue
            kv = step.session.kv
            # Drafts come with the last committed tokens, and on top of what was planned.
            count = committed + (len(step.block.tokens) if committed == step.base_rows else 0)
            self._guarded(step, partial(self._pool.reserve, kv, kv.length + count))
            if not step.finished:
                whole = count == step.pending and not step.is_prefill
                wanted = 1 + len(step.block.tokens) if whole else 0
                chosen.append((step, Rows(kv, step.rows(count), wanted)))
        self._sweep()
        return chosen

    def _run(self, chosen: Sequence[tuple[RunningStep, Rows]]) -> tuple[Judged, float]:
        """One pass of the target over the chosen rows, and the seconds it took; a device judges
        the blocks in that time, the CPU only when their steps ask."""
        started = time.perf_counter()
        taps = () if self._drafter is None else self._drafter.taps
        with jit.threads(self._threads):
            result = self._target.forward(Batch([rows for _, rows in chosen]), taps)
            asking = [step.question() for step, rows in chosen if rows.logits]
            answers = self._verifier.ask(result.logits, asking)
        return Judged(answers, result.features), time.perf_counter() - started

    def _commit(
        self, chosen: Sequence[tuple[RunningStep, Rows]], judged: Judged, seconds: float
    ) -> None:
        """Commit what holds of every step's block; the draft contexts follow the KV."""
        row = 0
        answers = iter(judged.answers)
        self._observe(chosen, seconds)
        for step, rows in chosen:
            answer = next(answers) if rows.logits else None
            judge = partial(self._verify, step, rows, answer, seconds)
            features = judged.features[row : row + len(rows.tokens)]
            self._guarded(step, partial(self._judge, step, rows.kv, judge, features))
            row += len(rows.tokens)
        self._sweep()

    def _fail(self, chosen: Sequence[tuple[RunningStep, Rows]], error: Exception) -> None:
        """The pass itself died: all that took part in it end with ``error``."""
        for step, _ in chosen:
            if not step.finished:
                step.fail(error)
            self._contexts.end(step)
        self._sweep()

    def _drop_cancelled(self) -> None:
        waiting = [step for step in self.waiting if step.cancelled]
        following = [step for step in self._following if step.cancelled]
        for step in waiting:
            self.waiting.remove(step)
        for step in following:
            del self._following[step]
        for step in (*waiting, *following, *self.running):
            if step.cancelled:
                self._guarded(step, partial(step.finish, FinishReason.CANCELLED))
        self._sweep()

    def _admit(self, live: Sequence[Session]) -> None:
        """Admit who is next while there is room; nobody passes a step that waits for memory."""
        while (step := self._next(live)) is not None:
            if not self._admission.make_room(step, live):
                return
            if step in self._following:
                del self._following[step]
            else:
                self.waiting.take()
            for other in self.running:  # their beginnings may be copied
                self._guarded(other, partial(self._contexts.catch_up, other))
            self._guarded(step, partial(self._start, step))
            if not step.finished:
                self.running.append(step)

    def _next(self, live: Sequence[Session]) -> RunningStep | None:
        """Whose turn it is to be admitted. Who waits for a beginning has left the line, so that
        others pass; it keeps its place among those that may run, and is next when that is there."""
        for follower, beginning in self._following.items():
            if beginning.settled:
                further = self._awaited(follower, live)
                if further is None:
                    return follower
                self._following[follower] = further
        while len(self.running) + len(self._following) < self._limits.running:
            step = self.waiting.next
            if step is None or (ahead := self._awaited(step, live)) is None:
                return step
            self._following[self.waiting.take()] = ahead
        return None

    def _awaited(self, step: RunningStep, live: Sequence[Session]) -> Beginning | None:
        return awaited(step, self.running, self._admission.known(step, live))

    def _start(self, step: RunningStep) -> None:
        self._admission.fill(step)
        step.admit()
        step.begin()

    def _propose(self) -> None:
        """Every step that decodes gets a block: a copy, a draft, or neither."""
        steps = [
            step
            for step in self.running
            if step.base_rows <= self._limits.decode_rows and not step.block.tokens
        ]
        copies: dict[int, Offer] = {}
        for index, step in enumerate(steps):
            offer = self._copy(step)
            if offer is not None:
                copies[index] = offer
        drafts = self._draft(steps, copies)
        for index, step in enumerate(steps):
            draft = drafts.get(index)
            offer = self._arbiter.better(step, copies.get(index), draft)
            if offer is not None and not step.finished:
                started = time.perf_counter()
                self._guarded(step, partial(self._lay_out, step, offer))
                if offer is draft:  # without the drafter there would be nothing to lay out
                    self._cycle.draft_s += time.perf_counter() - started

    def _lay_out(self, step: RunningStep, offer: Offer) -> None:
        proposer = self._proposer(step)
        extend = None if proposer is None else self._arbiter.continuation(proposer, step)
        step.offer(offer, extend)

    def _copy(self, step: RunningStep) -> Offer | None:
        try:
            proposer = self._proposer(step)
            return None if proposer is None else self._arbiter.copies(proposer, step)
        except Exception:
            # As with the drafter: proposals only ever save time.
            _log.exception("copying failed: a step goes on without")
            return None

    def _proposer(self, step: RunningStep) -> CopyProposer | None:
        if not self._arbiter.signals.copies:
            return None
        return step.session.copies(self._copied, step.kind)

    def _draft(self, steps: Sequence[RunningStep], copies: Mapping[int, Offer]) -> dict[int, Offer]:
        """One call of the drafter for all the steps for which it pays; their offers by index."""
        if self._drafter is None:
            return {}
        size, signals = self._drafter.block_size, self._arbiter.signals
        able = [i for i, step in enumerate(steps) if step.draftable(size, known=signals.known)]
        deciding = [steps[i] for i in able]
        known = {place: copies[i] for place, i in enumerate(able) if i in copies}
        others = self._bystanders(deciding)
        chosen = [able[place] for place in self._arbiter.to_draft(deciding, known, others)]
        started = time.perf_counter()
        for i in chosen:
            self._guarded(steps[i], partial(self._contexts.catch_up, steps[i]))
            self._guarded(steps[i], partial(self._contexts.reserve, steps[i], size))
        chosen = [i for i in chosen if not steps[i].finished]
        anchors = [steps[i].anchor(context_of(steps[i]), guided=signals.guided) for i in chosen]
        if not anchors:
            return {}
        try:
            with jit.threads(self._threads):
                proposals = self._drafter.propose(anchors)
        except Exception:
            # Drafts only ever save time, so the steps go on without; nobody should miss why.
            _log.exception("the drafter failed: %d steps decode one token plainly", len(chosen))
            return {}
        seconds = time.perf_counter() - started
        self._cycle.anchors, self._cycle.draft_s = len(anchors), seconds
        offers = {}
        for i, proposal in zip(chosen, proposals, strict=True):
            steps[i].drafted(seconds)
            if proposal.tokens:
                offers[i] = self._arbiter.drafted(steps[i], proposal)
        return offers

    def _budget(self) -> None:
        """Cut every block to what is to be verified of it."""
        steps = [step for step in self.running if step.base_rows <= self._limits.decode_rows]
        try:
            decisions = self._arbiter.decide(steps, self._bystanders(steps))
        except Exception:
            _log.exception("no budget: %d steps take what the grammar forces", len(steps))
            decisions = [Decision(step.block.free, "the policy failed") for step in steps]
        for step, decision in zip(steps, decisions, strict=True):
            if step.request.explain:
                self._cycle.explained[step] = (step.block, decision)
            step.block = step.block.first(decision.length)

    def _bystanders(self, steps: Sequence[RunningStep]) -> list[Candidate]:
        """The other steps of the pass: those that prefill, with the rows they may get."""
        others = [step for step in self.running if step not in steps]
        counts = plan([step.base_rows for step in self.running], self._limits)
        rows = dict(zip(map(id, self.running), counts, strict=True))
        return [
            Candidate((), base_rows=rows[id(step)], context=step.context)
            for step in others
            if rows[id(step)]
        ]

    def _observe(self, chosen: Sequence[tuple[RunningStep, Rows]], seconds: float) -> None:
        """What the pass took, beside what was foreseen; of passes that only decode."""
        cycle = self._cycle
        cycle.rows = sum(len(rows.tokens) for _, rows in chosen)
        cycle.requests, cycle.verify_s = len(chosen), seconds
        if self._cost is None:
            return
        context = sum(rows.kv.length for _, rows in chosen)
        cycle.predicted_s = self._cost.verify_s(cycle.rows, cycle.requests, context)
        cycle.predicted_s += self._cost.draft_s(cycle.anchors)
        if all(rows.logits for _, rows in chosen):
            self._cost.observe(
                cycle.rows, cycle.requests, context, cycle.anchors, seconds, cycle.draft_s
            )

    def _verify(self, step: RunningStep, rows: Rows, answer: Answer | None, seconds: float) -> None:
        step.computed(len(rows.tokens), seconds)
        if answer is None:
            return
        block = step.block
        if step.request.explain:
            step.account = self._cycle.account(step)
        accepted = step.advance(answer)
        self._arbiter.learn(step, self._proposer(step), block, accepted)

    def _judge(
        self,
        step: RunningStep,
        kv: KV,
        judge: Callable[[], None],
        features: Tensor,
    ) -> None:
        """Verify, and hand the drafter what it will read of the rows that hold: in one go, since a
        session that was closed meanwhile is kept for its beginning right afterwards."""
        before = kv.length
        judge()
        if kv.draft is not None:
            self._contexts.remember(step, features[: kv.length - before])

    def _guarded(self, step: RunningStep, work: Callable[[], None]) -> None:
        """Whatever a step dies of is that step's own error: its neighbours go on."""
        try:
            work()
        except Exception as error:
            if not step.finished:
                step.fail(error)
        if step.finished and step.unread:
            self._contexts.end(step)
        if step.finished and step.session.closed and step.session.running is None:
            self._retire(step.session)

    def _sweep(self) -> None:
        self.running = [step for step in self.running if not step.finished]
