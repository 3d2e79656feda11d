"""A step on its way: what it still has to compute, what it proposes, what it commits.

The rules of a step live here, one session at a time and without a model; the engine's loop brings
the logits. ``commit`` is the only writer of a session's log while a step runs: token log, grammar
state, sampler and text advance together.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING

from torch import Tensor

from dspark_backend.events import Failed, Finished, Prefilled, StepEvent, Tokens
from dspark_backend.request import FinishReason, ForcedMode, StepKind, StepOutcome, StepRequest
from dspark_backend.sampling.drafting import SampledDrafts
from dspark_backend.sampling.sampler import Sampler
from dspark_backend.sampling.stop import StopStrings
from dspark_backend.sampling.verifier import Answer, Question
from dspark_backend.speculation.account import CycleAccount
from dspark_backend.speculation.block import (
    FORCED,
    Block,
    Extend,
    Offer,
    constrained,
    unconstrained,
    verbatim,
)
from dspark_backend.speculation.guide import ChainGuide, Choice, Likeliest
from dspark_backend.speculation.protocol import Anchor, Proposal
from dspark_backend.speculation.trail import Trail
from dspark_backend.tally import Tally

if TYPE_CHECKING:
    from dspark_backend.kv.sequence import Positions
    from dspark_backend.session import Session
    from dspark_backend.tokenizer import Tokenizer

MODEL = "model"


class RunningStep:
    """One submitted step of one session; the engine's loop drives it."""

    def __init__(
        self,
        session: Session,
        request: StepRequest,
        tokenizer: Tokenizer,
        vocab_size: int,
        on_event: Callable[[StepEvent], None] | None,
    ) -> None:
        """Appends the request's tokens to the log. Raises RequestError for bad sampling."""
        self.session = session
        self.request = request
        self._tally = Tally()
        self.metrics = self._tally.metrics
        self.block = Block()
        self.account: CycleAccount | None = None
        """Of the cycle under way, where the request asks to explain; what it brought is added."""
        self._accounts: list[CycleAccount] = []
        self.finished = False
        self.unread: list[Tensor] = []
        """Features of computed tokens that the drafter has not read yet, in order."""
        self.weight = 1.0
        """What a token of this step is worth beside one of another."""
        self.events: queue.SimpleQueue[StepEvent] = queue.SimpleQueue()
        self.over = threading.Event()
        """Set when the last event is in the queue."""
        self._on_event = on_event
        self._callback_error: Exception | None = None
        self._cancelled = threading.Event()
        after_s = math.inf if request.deadline_s is None else request.deadline_s
        self.due = self._tally.submitted + after_s
        """When the step should be over, on the clock of ``time.perf_counter``."""
        self.freely = 0
        """Tokens written since the last one that the grammar forced."""
        self._prefilling = True
        self._stops = StopStrings(request.stop)
        self._sampler = Sampler(request.sampling, [*session.log, *request.tokens], vocab_size)
        self._trail: Trail | None = None
        self._guide: ChainGuide | None = None
        if request.grammar is not None:  # verified spans may be written in any tokenisation
            canonical = request.forced is ForcedMode.CANONICAL
            matcher = request.grammar.matcher(canonical=canonical)
            self._trail = Trail(matcher, canonical=canonical)
        ends = () if request.ignore_eos else tokenizer.eos_token_ids
        grammatical = () if request.grammar is None else (request.grammar.end_of_turn_id,)
        self._ends = frozenset((*ends, *grammatical, *request.stop_token_ids))
        self._stream = tokenizer.stream()
        self._text: list[str] = []
        session.read(request.tokens)
        self._start = len(session.log)

    # -- what the loop asks ------------------------------------------------------------------

    @property
    def pending(self) -> int:
        """Committed tokens whose keys and values are not computed yet, plus the drafts on top."""
        return self.base_rows + len(self.block.tokens)

    @property
    def base_rows(self) -> int:
        """Committed tokens whose keys and values are not computed yet."""
        return len(self.session.log) - self.session.kv.length

    @property
    def context(self) -> int:
        """Positions that are computed."""
        return self.session.kv.length

    @property
    def kind(self) -> StepKind:
        return self.request.kind

    @property
    def rejects(self) -> bool:
        """Whether its drafts are sampled and judged by rejection sampling."""
        return self._sampler.rejects

    @property
    def is_prefill(self) -> bool:
        """Whether the step only computes its tokens and writes nothing."""
        return self.request.max_new_tokens == 0

    @property
    def admitted(self) -> bool:
        """Whether the step has left the queue."""
        return self._tally.admitted

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """End the step at the next iteration of the loop; thread-safe, idempotent."""
        self._cancelled.set()

    def admit(self) -> None:
        """The step leaves the queue; ``session.kv`` holds what could be re-used by now."""
        self._tally.admit(self.session.kv.length)

    def rows(self, count: int) -> list[int]:
        """The first ``count`` tokens to compute: committed ones, then drafts."""
        first = self.session.kv.length
        waiting = self.session.log[first : first + count]
        return [*waiting, *self.block.tokens[: count - len(waiting)]]

    @property
    def determined(self) -> bool:
        """Whether the grammar forces what comes next. Raises GrammarError when it dies."""
        if self._trail is None or self.request.forced is ForcedMode.OFF:
            return False
        with self._tally.grammar():
            return bool(self._trail.forced())

    # -- what the loop tells -----------------------------------------------------------------

    def begin(self) -> None:
        """Before the first pass: a span that the grammar forces from the start is committed."""
        self.splice()

    @property
    def room(self) -> int:
        """Drafts that can be of use: the token after the last of them must fit as well."""
        return self.request.max_new_tokens - self.new_tokens - 1

    def draftable(self, block_size: int, *, known: bool = True) -> bool:
        """Whether a drafter can go on from here: the committed tokens that are not computed leave a
        slot of its block (with ``known`` off, there is one such token), and nobody has proposed
        yet."""
        most = block_size if known else 1
        return 1 <= self.base_rows <= most and self.room > 0 and not self.block.tokens

    def clear(self) -> None:
        """Before a pass: an empty block, or what the grammar forces where that is verified."""
        trail, self.block, self._guide = self._trail, Block(), None
        if trail is None:
            return
        with self._tally.grammar():
            forced = trail.forced() if self.request.forced is ForcedMode.VERIFY else ()
            offer = Offer(Proposal(forced, (1.0,) * len(forced), FORCED), (1.0,) * len(forced))
            self.block = constrained(trail, offer if forced else None, room=max(self.room, 0))

    def anchor(self, context: Positions, *, guided: bool = True) -> Anchor:
        """Where a drafter goes on, ``context`` being its own of this session; for one call of it.
        With ``guided`` off, drafts that are not sampled do not look at the grammar."""
        first = self.session.kv.length
        token, *known = self.session.log[first:]
        choice: Choice = Likeliest()
        if self._sampler.rejects:
            choice = SampledDrafts(self._sampler, first, len(known))
        elif self._trail is None or not guided:
            return Anchor(context, token, tuple(known))
        self._guide = ChainGuide(self._trail, self.room, choice)
        return Anchor(context, token, tuple(known), self._guide)

    def drafted(self, seconds: float) -> None:
        """A drafter answered; ``seconds`` is what that cost, the guide's share included."""
        if self._guide is not None:
            seconds -= self._guide.grammar_s
            self.metrics.grammar_s += self._guide.grammar_s
        self.metrics.draft_s += seconds

    def offer(self, offer: Offer, extend: Extend | None) -> None:
        """Lay an offer out as the block, as far as the grammar lets it; ``extend`` says what may
        follow it."""
        if self._trail is None:
            self.block = unconstrained(offer, room=self.room, extend=extend)
            return
        with self._tally.grammar():
            self.block = constrained(self._trail, offer, room=max(self.room, 0), extend=extend)

    def offer_under_way(self, offer: Offer | None, count: int) -> None:
        """As :meth:`offer`, of ``count`` drafts that a pass has begun to compute."""
        with self._tally.grammar():
            self.block = verbatim(self._trail, offer, count)

    def computed(self, rows: int, seconds: float) -> None:
        """A pass computed the next ``rows`` tokens; those that are in the log are done."""
        session = self.session
        before = session.kv.length
        session.kv.length = min(before + rows, len(session.log))
        if self._prefilling:
            self.metrics.prefill_s += seconds
            # A span forced from the start is computed along, but it is output, not prompt.
            prompt = min(session.kv.length, self._start) - min(before, self._start)
            self.metrics.prefill_new_tokens += prompt
            if session.kv.length == len(session.log):
                self._prefilling = False
                cached = self.metrics.prefill_cached_tokens
                self._emit(Prefilled(self.metrics.prefill_new_tokens, cached))
                if self.is_prefill:
                    self.finish(FinishReason.LENGTH)
        else:
            self.metrics.decode_s += seconds

    def question(self) -> Question:
        """What a pass over the block is asked: which of its tokens stand, and what follows."""
        block = self.block
        return Question(self._sampler, block.tokens, block.masks, block.distributions)

    def advance(self, answer: Answer, *, splice: bool = True) -> int:
        """Commit what ``answer`` lets stand of the block, and what follows it, with ``splice`` what
        is forced after it as well. Returns how many of the block's tokens stood.

        Raises GrammarError when the grammar allows nothing or dies; the step is to fail then.
        """
        self.metrics.cycles += 1
        block = self.block
        started = time.perf_counter()
        acceptance = answer()
        self.metrics.verify_s += time.perf_counter() - started
        self.block = Block()
        if self.account is not None:
            self.account = replace(self.account, accepted=acceptance.accepted)
        self._tally.judged(block.sources, acceptance.accepted)
        self.session.kv.length += acceptance.accepted
        accepted = zip(block.sources, block.tokens[: acceptance.accepted], strict=False)
        for source, run in groupby(accepted, key=itemgetter(0)):
            if not self.finished:
                self._commit([token for _, token in run], source)
        if not self.finished:
            self._commit([acceptance.next_token], MODEL)
        if splice:
            self.splice()
        self._close_account()
        return acceptance.accepted

    def splice(self) -> None:
        """Commit what the grammar forces from here on, where that is not verified."""
        if self._trail is not None and not self.finished:
            self._commit_forced(self._trail)

    def finish(self, reason: FinishReason) -> None:
        """End the step; its session is free for the next one when the event is out."""
        self._deliver(self._stops.feed(self._stream.flush())[0] + self._stops.flush(), (), MODEL)
        self._tally.close(self.new_tokens)
        self._close_account()
        self.finished = True
        new = tuple(self.session.log[self._start : self._start + self.new_tokens])
        text = "".join(self._text)
        outcome = StepOutcome(new, text, reason, self.metrics, tuple(self._accounts))
        self._release()
        self._emit(Finished(outcome))

    def fail(self, error: Exception) -> None:
        """End the step with an error; other steps do not notice."""
        self._tally.close(self.new_tokens)
        self.finished = True
        self._release()
        if error is self._callback_error:
            self._on_event = None  # it raised: it gets no further call, the handle does
        self._emit(Failed(error))

    @property
    def new_tokens(self) -> int:
        # What follows a prefill in the log is the next step's.
        return 0 if self.is_prefill else len(self.session.log) - self._start

    # -- the rules ---------------------------------------------------------------------------

    def _commit_forced(self, trail: Trail) -> None:
        with self._tally.grammar():
            span = trail.span()
        if span:
            room = self.request.max_new_tokens - self.new_tokens
            self._tally.wrote(FORCED, len(span), min(room, len(span)))
            self._commit(span[:room], FORCED)

    def _commit(self, tokens: Sequence[int], source: str) -> None:
        """Append to the log, up to the token that ends the step, and say so."""
        taken = []
        reason: FinishReason | None = None
        text = ""
        for token in tokens:
            taken.append(token)
            self.session.log.append(token)
            self._sampler.observe(token)
            if token in self._ends:
                reason = FinishReason.STOP
                break
            delta, stopped = self._stops.feed(self._stream.feed([token]))
            text += delta
            if stopped:
                reason = FinishReason.STOP_STRING
                break
            if self.new_tokens >= self.request.max_new_tokens:
                reason = FinishReason.LENGTH
                break
        if self._trail is not None:
            self._advance_grammar(self._trail, taken, reason)
        self.freely = 0 if source is FORCED else self.freely + len(taken)
        if source is MODEL:
            self._tally.wrote(MODEL, len(taken), len(taken))
        # A draft after an accepted end is computed, but not part of the log.
        self.session.kv.length = min(self.session.kv.length, len(self.session.log))
        self._deliver(text, tuple(taken), source)
        if reason is None and self._trail is not None and self._trail.over():
            # Nothing but the end of the turn can follow: no pass is spent on it.
            reason = FinishReason.GRAMMAR
        if reason is not None:
            self.finish(reason)

    def _advance_grammar(
        self, trail: Trail, tokens: list[int], reason: FinishReason | None
    ) -> None:
        with self._tally.grammar():
            ended = reason is FinishReason.STOP and tokens[-1] != trail.end_of_turn_id
            trail.commit(tokens[:-1] if ended else tokens)

    def _deliver(self, text: str, tokens: tuple[int, ...], source: str) -> None:
        if tokens:
            self._tally.delivered()
        if text:
            self._text.append(text)
        if text or tokens:
            self._emit(Tokens(tokens, text, source))

    def _close_account(self) -> None:
        if self.account is not None:
            written = len(self.session.log) - self.account.position
            self._accounts.append(replace(self.account, written=written))
            self.account = None

    def _release(self) -> None:
        self.block = Block()
        if self.session.running is self:  # a step may have taken over from a prefill
            self.session.step_ended()

    def _emit(self, event: StepEvent) -> None:
        self.events.put(event)
        try:
            if self._on_event is not None:
                self._on_event(event)
        except Exception as error:
            self._callback_error = error
            raise
        finally:
            if isinstance(event, Finished | Failed):
                self.over.set()
