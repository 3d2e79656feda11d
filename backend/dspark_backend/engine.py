"""The engine: a model, its sessions, and the loop that takes their steps together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dspark_backend.catalog import ModelFiles, ProgressSink, resolve
from dspark_backend.checkpoint.config import TargetConfig
from dspark_backend.errors import (
    CapacityError,
    ContextLengthError,
    EngineClosedError,
    RequestError,
)
from dspark_backend.events import StepEvent
from dspark_backend.grammar.compile import Grammar
from dspark_backend.grammar.dialect import Dialect, dialect_for
from dspark_backend.handle import StepHandle
from dspark_backend.kernels import jit
from dspark_backend.kv.contiguous import KVBudget, SequenceKV
from dspark_backend.kv.prefix import PrefixCache
from dspark_backend.request import FinishReason, StepOutcome, StepRequest
from dspark_backend.running import RunningStep
from dspark_backend.scheduler import Limits, plan
from dspark_backend.session import Session
from dspark_backend.target.batch import Batch, Rows
from dspark_backend.target.decoder import Decoder
from dspark_backend.target.load import load_decoder
from dspark_backend.target.precision import Precision, default_precision

if TYPE_CHECKING:
    from dspark_backend.grammar.spec import TurnSpec

DEFAULT_CONTEXT = 8192
DEFAULT_KV_BYTES = 2 * 2**30


class Engine:
    """One model in this process. Made by :meth:`load`; closed by :meth:`close` or a ``with`` block.

    All methods may be called from any thread; the model itself runs in the engine's own.
    """

    def __init__(
        self,
        files: ModelFiles,
        decoder: Decoder,
        precision: Precision,
        threads: int,
        kv_bytes: int,
        limits: Limits,
    ) -> None:
        self.files = files
        self.name = files.name
        self.config: TargetConfig = files.config
        self.tokenizer = files.tokenizer()
        self.precision = precision
        self.threads = threads
        self.max_context = decoder.max_positions
        self.lock = threading.RLock()
        self._decoder = decoder
        self._limits = limits
        self._budget = KVBudget(kv_bytes)
        self._prefixes = PrefixCache(kv_bytes // 4)
        self._sessions: set[Session] = set()
        self._queued: list[RunningStep] = []
        self._running: list[RunningStep] = []
        self._work = threading.Condition(self.lock)
        self._closing = False
        self._thread = threading.Thread(target=self._loop, name="dspark-engine", daemon=True)
        self._thread.start()

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        precision: str | None = None,
        threads: int | None = None,
        max_context: int | None = None,
        kv_bytes: int = DEFAULT_KV_BYTES,
        limits: Limits | None = None,
        progress: ProgressSink | None = None,
    ) -> Engine:
        """Fetch (if needed), map and start a model.

        ``model``: a known name, a local folder or GGUF file, or a hub id. ``precision``: ``bf16``,
        ``int8`` or ``int8x16``; None takes the model's default. ``threads``: None for all cores.
        ``max_context``: tokens a session may hold, None for the model's own limit up to 8,192.
        ``kv_bytes``: memory granted to keys and values of all sessions.

        Raises:
            ModelNotFoundError, DownloadError, ModelFormatError: no such model, no way to get it,
                or not one that this engine runs.
            RequestError: an unknown precision, or a number out of range.
        """
        files = resolve(str(model), progress=progress)
        chosen = default_precision(files.name) if precision is None else Precision.parse(precision)
        longest = files.config.max_position_embeddings
        context = min(longest, DEFAULT_CONTEXT) if max_context is None else max_context
        if not 1 <= context <= longest:
            raise RequestError(
                f"max_context {context} is out of range: {files.name} was trained for {longest}"
            )
        workers = jit.default_threads() if threads is None else threads
        if workers < 1:
            raise RequestError(f"threads must be at least 1, not {workers}")
        decoder = load_decoder(files, chosen, context, progress)
        decoder.warm()
        return cls(files, decoder, chosen, workers, kv_bytes, limits or Limits())

    # -- the public side ---------------------------------------------------------------------

    @cached_property
    def dialect(self) -> Dialect:
        """How this model family writes turns and tool calls."""
        return dialect_for(self.tokenizer, self.config)

    def compile(self, spec: TurnSpec) -> Grammar | None:
        """The grammar of what a turn may hold; None when anything may. Cached.

        Raises GrammarError for a schema that cannot be honoured.
        """
        return self.dialect.grammar(spec)

    def open_session(self) -> Session:
        """An empty session. Raises EngineClosedError."""
        with self.lock:
            self._check_open()
            return self._adopt(SequenceKV(self._decoder.kv_shape, self._budget))

    def submit(
        self,
        session: Session,
        request: StepRequest,
        on_event: Callable[[StepEvent], None] | None = None,
    ) -> StepHandle:
        """Start a step; ``on_event`` is called from the engine's thread and must not block.

        Raises:
            RequestError: nothing to go on from, an id outside the vocabulary, or bad sampling.
            ContextLengthError: the session's log, the request and ``max_new_tokens`` together
                exceed ``max_context``.
            SessionClosedError: the session is closed or has a step in flight.
            EngineClosedError: the engine was closed.
        """
        with self.lock:
            self._check_open()
            session.check_idle("take a step")
            self._check(session, request)
            step = RunningStep(session, request, self.tokenizer, self.config.vocab_size, on_event)
            session.running = step
            self._queued.append(step)
            self._work.notify()
            return StepHandle(step)

    def step(self, session: Session, request: StepRequest) -> StepOutcome:
        """Take a step and wait for it. Raises what :meth:`submit` and the step itself raise."""
        return self.submit(session, request).result()

    def close(self) -> None:
        """Cancel what runs, free the memory, end the thread. Idempotent."""
        with self.lock:
            self._closing = True
            for step in (*self._queued, *self._running):
                step.cancel()
            self._work.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        with self.lock:
            for session in list(self._sessions):
                session.close()
            self._prefixes.clear()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def kv_used_bytes(self) -> int:
        """KV memory held by sessions and the prefix cache."""
        return self._budget.used_bytes

    # -- what sessions need (SessionOwner) ---------------------------------------------------

    def fork(self, session: Session) -> Session:
        """See :meth:`Session.fork`."""
        self._check_open()
        kv = SequenceKV(self._decoder.kv_shape, self._budget)
        self._make_room(kv, session.kv.length)
        kv.copy_prefix(session.kv, session.kv.length)
        twin = self._adopt(kv)
        twin.log.extend(session.log)
        return twin

    def closed(self, session: Session) -> None:
        """See :meth:`Session.close`; with a step in flight the loop finishes the job."""
        if session.running is None:
            self._retire(session)

    # -- the loop ----------------------------------------------------------------------------

    def _loop(self) -> None:
        torch.set_num_threads(self.threads)
        with torch.inference_mode():
            while True:
                with self.lock:
                    while not (self._queued or self._running or self._closing):
                        self._work.wait()
                    if self._closing and not (self._queued or self._running):
                        return
                self._iterate()

    def _iterate(self) -> None:
        """One pass: schedule, propose, run the target, verify and commit."""
        with self.lock:
            self._drop_cancelled()
            self._admit()
            chosen = self._schedule()
        if not chosen:
            return
        started = time.perf_counter()
        batch = Batch([rows for _, rows in chosen])
        with jit.threads(self.threads):
            result = self._decoder.forward(batch)
        seconds = time.perf_counter() - started
        with self.lock:
            first = 0
            for step, rows in chosen:
                logits = result.logits[first : first + rows.logits]
                first += rows.logits
                self._guarded(step, partial(_commit, step, rows, logits, seconds))
            self._running = [step for step in self._running if not step.finished]

    def _drop_cancelled(self) -> None:
        for step in (*self._queued, *self._running):
            if step.cancelled:
                self._guarded(step, partial(step.finish, FinishReason.CANCELLED))
        self._queued = [step for step in self._queued if not step.finished]
        self._running = [step for step in self._running if not step.finished]

    def _admit(self) -> None:
        while self._queued and len(self._running) < self._limits.running:
            step = self._queued.pop(0)
            self._guarded(step, partial(self._start, step))
            if not step.finished:
                self._running.append(step)

    def _start(self, step: RunningStep) -> None:
        session = step.session
        if session.kv.length == 0:
            others = [(s.log, s.kv) for s in self._sessions if s is not session]
            source, shared = self._prefixes.longest(session.log, others)
            # One token is computed in any case: its logits are what the step goes on from.
            shared = min(shared, len(session.log) - 1)
            if source is not None and shared > 0:
                self._make_room(session.kv, shared)
                session.kv.copy_prefix(source, shared)
        step.admit()
        step.begin()

    def _schedule(self) -> list[tuple[RunningStep, Rows]]:
        ready = []
        for step in self._running:
            self._guarded(step, step.propose)
        self._running = [step for step in self._running if not step.finished]
        counts = plan([step.pending for step in self._running], self._limits)
        for step, count in zip(self._running, counts, strict=True):
            if not count:
                continue
            kv = step.session.kv
            self._guarded(step, partial(self._make_room, kv, kv.length + count))
            if not step.finished:
                wanted = 1 + len(step.drafts) if count == step.pending else 0
                ready.append((step, Rows(kv, step.rows(count), wanted)))
        self._running = [step for step in self._running if not step.finished]
        return ready

    def _guarded(self, step: RunningStep, work: Callable[[], None]) -> None:
        """Whatever a step dies of is that step's own error: its neighbours go on."""
        try:
            work()
        except Exception as error:
            if not step.finished:
                step.fail(error)
        if step.finished and step.session.closed:
            self._retire(step.session)

    # -- memory and checks -------------------------------------------------------------------

    def _make_room(self, kv: SequenceKV, length: int) -> None:
        """Reserve ``length`` positions, giving up kept prefixes for it. Raises CapacityError."""
        while not self._budget.fits(kv.capacity_bytes_for(length)) and self._prefixes.evict():
            pass
        kv.reserve(length)

    def _adopt(self, kv: SequenceKV) -> Session:
        session = Session(kv, self)
        self._sessions.add(session)
        return session

    def _retire(self, session: Session) -> None:
        if session in self._sessions:
            self._sessions.discard(session)
            self._prefixes.keep(session.log, session.kv)

    def _check_open(self) -> None:
        if self._closing:
            raise EngineClosedError("the engine was closed; load it again")

    def _check(self, session: Session, request: StepRequest) -> None:
        log, new = len(session.log), len(request.tokens)
        if log + new == 0:
            raise RequestError("the step has no tokens and its session is empty: give a prompt")
        if new == 0 and session.kv.length == log:
            raise RequestError(
                "the step has no tokens and all of its session's log is computed: "
                "give at least one token, or roll one back"
            )
        if request.max_new_tokens < 1:
            raise RequestError(f"max_new_tokens must be at least 1, not {request.max_new_tokens}")
        highest = max(request.tokens, default=0)
        if highest >= self.config.vocab_size or min(request.tokens, default=0) < 0:
            raise RequestError(
                f"a prompt token is outside the vocabulary of {self.config.vocab_size}"
            )
        needed = log + new + request.max_new_tokens
        if needed > self.max_context:
            raise ContextLengthError(
                f"the step needs {needed} tokens ({log} in the session, {new} new, "
                f"{request.max_new_tokens} to write), the context holds {self.max_context}: "
                "ask for fewer, shorten the prompt, or load the engine with a larger max_context"
            )
        if self._decoder.kv_shape.bytes_per_token * needed > self._budget.limit_bytes:
            raise CapacityError(
                f"the step needs {needed} positions, more than all of kv_bytes "
                f"({self._budget.limit_bytes / 2**20:.0f} MiB) holds; raise kv_bytes"
            )
        if request.grammar is not None and request.grammar.words != _words(self.config.vocab_size):
            raise RequestError(
                f"the grammar was compiled for {request.grammar.words * 32} tokens, the model "
                f"has {self.config.vocab_size}: compile it with this engine"
            )


def _commit(step: RunningStep, rows: Rows, logits: torch.Tensor, seconds: float) -> None:
    step.computed(len(rows.tokens), seconds)
    if rows.logits:
        step.advance(logits)


def _words(vocab_size: int) -> int:
    return (vocab_size + 31) // 32
