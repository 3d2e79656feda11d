"""The engine: a model, its sessions, and the loop that takes their steps together."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dspark_backend.ahead_loop import AheadLoop
from dspark_backend.catalog import ModelFiles, ProgressSink, resolve
from dspark_backend.catalog.files import folder_identity
from dspark_backend.checkpoint.config import TargetConfig
from dspark_backend.cost_measure import kept_or_measured
from dspark_backend.devices import gpu
from dspark_backend.errors import EngineClosedError, RequestError
from dspark_backend.events import StepEvent
from dspark_backend.grammar.compile import Grammar
from dspark_backend.grammar.dialect import Dialect, dialect_for
from dspark_backend.handle import StepHandle
from dspark_backend.kernels import jit
from dspark_backend.kernels.apart import apart
from dspark_backend.kernels.recording import Recordings
from dspark_backend.kv.pool import SequencePool
from dspark_backend.kv.sequence import KV
from dspark_backend.loop import StepLoop
from dspark_backend.parts import Parts, cpu_parts, device_parts, drafter_folder
from dspark_backend.rehearsal import compile_kernels
from dspark_backend.request import StepOutcome, StepRequest, Urgency
from dspark_backend.request_check import positions_of
from dspark_backend.running import RunningStep
from dspark_backend.scheduler import Limits
from dspark_backend.session import Session
from dspark_backend.speculation.arbiter import Arbiter
from dspark_backend.speculation.candidate import BudgetPolicy
from dspark_backend.speculation.cost import CostModel
from dspark_backend.speculation.cost_store import check_conditions, conditions_here, forget
from dspark_backend.speculation.memory import Memories, Memory
from dspark_backend.speculation.policies import Fixed, named
from dspark_backend.speculation.signals import Signals
from dspark_backend.speculation.step_aware import StepAware

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
        parts: Parts,
        threads: int,
        kv_bytes: int,
        limits: Limits,
        policy: BudgetPolicy | None = None,
        cost: CostModel | None = None,
        signals: Signals | None = None,
    ) -> None:
        """A drafter or ``cost`` turn speculation on: ``cost`` is what passes and drafts take on
        this machine, so that copies and drafts are verified as far as they pay. ``policy`` says how
        much that is, ``step_aware`` when left out, or whole blocks where no cost is known, in which
        case nothing is copied either. ``signals`` is for ablations."""
        self.files = files
        self.name = files.name
        self.config: TargetConfig = files.config
        self.tokenizer = files.tokenizer()
        self.precision = parts.precision
        drafter = parts.drafter
        self.threads = threads
        self.max_context = parts.target.max_positions
        self.speculative = drafter is not None or cost is not None
        self.cost = cost
        self.lock = threading.RLock()
        draft_shape = None if drafter is None else drafter.context_shape
        self._pool = SequencePool(parts.target.storage(draft_shape, kv_bytes))
        size = 0 if drafter is None else drafter.block_size
        usual = Fixed(size) if cost is None else StepAware(block_size=size or 8)
        signals = signals or Signals(copies=cost is not None)
        arbiter = Arbiter(size, policy or usual, cost, signals)
        loop = StepLoop if parts.flights is None else partial(AheadLoop, parts.flights)
        self._loop: StepLoop = loop(
            parts.target,
            parts.verifier,
            self._pool,
            threads,
            limits,
            drafter,
            arbiter,
            cost,
            self._retire,
        )
        self._copies = signals.copies
        self._memories = Memories(self.tokenizer)
        self._sessions: set[Session] = set()
        self._work = threading.Condition(self.lock)
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="dspark-engine", daemon=True)
        self._thread.start()
        # The interpreter stops daemon threads in the middle of whatever they do; where that is C++
        # code, it aborts the process.
        atexit.register(self.close)

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        device: str | None = None,
        precision: str | None = None,
        threads: int | None = None,
        max_context: int | None = None,
        kv_bytes: int = DEFAULT_KV_BYTES,
        limits: Limits | None = None,
        speculation: bool | None = None,
        drafter: str | Path | None = None,
        policy: str | BudgetPolicy | None = None,
        signals: Signals | None = None,
        cost: CostModel | None = None,
        graphs: bool = False,
        ahead: bool = False,
        progress: ProgressSink | None = None,
    ) -> Engine:
        """Fetch (if needed), map and start a model.

        ``model``: a known name, a local folder or GGUF file, or a hub id. ``device``: ``cpu``
        (None), or ``cuda`` or ``cuda:N`` for a GPU. ``precision``: ``bf16``, ``fp32`` or, on the
        CPU, ``int8`` or ``int8x16``; None takes the model's default. ``threads``: None for all
        cores. ``max_context``: tokens a session may hold, None for the model's own limit up to
        8,192. ``kv_bytes``: memory granted to keys and values of all sessions; a GPU's is taken at
        once. ``speculation``: False decodes plainly; else tokens are copied from the session's log,
        and drafted with ``drafter`` (a checkpoint folder) or the one that ships for this model,
        which True insists on.
        ``policy`` says how much of a proposal is verified: a name such as ``step_aware`` (the
        default), ``fixed-4`` or ``plain``, see :func:`~dspark_backend.speculation.policies.named`.
        ``signals`` turns parts of the scheduler off, for ablations. ``cost`` foresees the seconds
        of passes and drafts; None takes what was measured on this machine before, or measures it
        (two seconds) unless ``speculation`` is False. ``graphs`` records small passes, drafts and
        verifications of a GPU as CUDA graphs and replays them; ``ahead`` has a GPU begin the next
        cycle before the last one was read, where all steps allow it (docs/device.md). Both are off,
        since neither has run on hardware. The output is the same in all cases.

        Raises:
            ModelNotFoundError, DownloadError, ModelFormatError: no such model, no way to get it,
                or not one that this engine runs.
            DeviceError: no such GPU here, or not one that the engine's kernels run on.
            CapacityError: the GPU has no memory of ``kv_bytes``.
            RequestError: an unknown device or precision, a number out of range, speculation without
                a drafter, ``graphs`` or ``ahead`` on the CPU, or a cost that was measured under
                other conditions than these.
        """

        def build() -> Engine:
            place = gpu(device)
            if graphs and place is None:
                raise RequestError("graphs are a GPU's: load with device='cuda', or without graphs")
            if ahead and place is None:
                raise RequestError(
                    "ahead is a GPU's: there, the host waits for the device; load with "
                    "device='cuda', or without ahead"
                )
            files = resolve(str(model), progress=progress)
            longest = files.config.max_position_embeddings
            context = min(longest, DEFAULT_CONTEXT) if max_context is None else max_context
            if not 1 <= context <= longest:
                raise RequestError(
                    f"max_context {context} is out of range: {files.name} was trained for {longest}"
                )
            workers = _workers(threads)
            folder = drafter_folder(files, speculation, drafter)
            parts = (
                cpu_parts(files, precision, context, folder, progress)
                if place is None
                else device_parts(
                    *(files, precision, context, folder, place),
                    Recordings(place) if graphs else None,
                    ahead=ahead,
                )
            )
            identity = None if folder is None else folder_identity(folder)
            compile_kernels(parts.target, parts.drafter, parts.verifier, workers)
            conditions = conditions_here(
                files.source_sha, parts.precision.value, workers, identity, parts.hardware
            )
            known = cost
            if known is not None:
                check_conditions(known.table, conditions)
            elif speculation is not False:
                known = kept_or_measured(parts.target, parts.drafter, conditions)
            size = 8 if parts.drafter is None else parts.drafter.block_size
            budget = named(policy, size) if isinstance(policy, str) else policy
            return cls(files, parts, workers, kv_bytes, limits or Limits(), budget, known, signals)

        return apart(build)

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

    def open_session(self, agent: Hashable | None = None) -> Session:
        """An empty session. Sessions of one ``agent`` (any key) copy from what each of them read
        and wrote, which changes their speed alone. Raises EngineClosedError."""
        with self.lock:
            self._check_open()
            return self._adopt(self._pool.new(), self._memories.of(agent if self._copies else None))

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
            CapacityError: the step can never run: it is larger than ``kv_bytes``. One for which
                the memory is not free now waits in the queue.
            SessionClosedError: the session is closed or has a step in flight that is no prefill.
            EngineClosedError: the engine was closed.
        """
        with self.lock:
            self._check_open()
            prefill = session.prefilling
            if prefill is None:
                session.check_idle("take a step")
            self._check(session, request)
            step = RunningStep(session, request, self.tokenizer, self.config.vocab_size, on_event)
            if prefill is not None:
                prefill.cancel()  # what it has not computed is part of the log that this one takes
            session.running = step
            session.expected_at = None
            self._loop.submit(step)
            self._work.notify()
            return StepHandle(step)

    def prefill(self, session: Session, tokens: Sequence[int]) -> StepHandle:
        """Append ``tokens`` to the log and compute it in the background, when nobody more urgent
        needs the model: for what is certain to follow, while a tool runs.

        The next step takes over from a prefill that is not done (its handle ends with
        ``cancelled``) and loses nothing; so does who cancels it: the tokens stay in the log.

        Raises:
            RequestError, ContextLengthError, SessionClosedError, EngineClosedError: as
                :meth:`submit`.
        """
        return self.submit(session, StepRequest(tuple(tokens), 0, urgency=Urgency.BACKGROUND))

    def step(self, session: Session, request: StepRequest) -> StepOutcome:
        """Take a step and wait for it. Raises what :meth:`submit` and the step itself raise."""
        return self.submit(session, request).result()

    def close(self) -> None:
        """Cancel what runs, free the memory, end the thread. Idempotent."""
        with self.lock:
            self._closing = True
            for step in self._loop.unfinished:
                step.cancel()
            self._work.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        atexit.unregister(self.close)
        with self.lock:
            for session in list(self._sessions):
                session.close()
            self._pool.clear()
        if self.cost is not None and self.cost.table.conditions is not None and self.cost.drifted:
            forget(self.cost.table.conditions)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def kv_used_bytes(self) -> int:
        """KV memory held by sessions and the prefix cache."""
        return self._pool.used_bytes

    # -- what sessions need (SessionOwner) ---------------------------------------------------

    def fork(self, session: Session) -> Session:
        """See :meth:`Session.fork`."""
        self._check_open()
        twin = self._adopt(self._pool.copy(session.kv), session.memory)
        twin.log.extend(session.log)
        return twin

    def closed(self, session: Session) -> None:
        """See :meth:`Session.close`; with a step in flight the loop finishes the job."""
        if session.running is None:
            self._retire(session)

    # -- the engine's own thread -------------------------------------------------------------

    def _run(self) -> None:
        torch.set_num_threads(self.threads)
        with torch.inference_mode():
            while self._wait_for_work():
                self._loop.iterate(self.lock, lambda: list(self._sessions))

    def _wait_for_work(self) -> bool:
        """False when the engine is closing and nothing is left to end."""
        with self.lock:
            while self._loop.idle and not self._closing:
                self._work.wait()
            return not self._loop.idle

    # -- sessions and checks -----------------------------------------------------------------

    def _adopt(self, kv: KV, memory: Memory) -> Session:
        session = Session(kv, self, memory)
        self._sessions.add(session)
        return session

    def _retire(self, session: Session) -> None:
        if session in self._sessions:
            self._sessions.discard(session)
            self._pool.retire(session.log, session.kv)

    def _check_open(self) -> None:
        if self._closing:
            raise EngineClosedError("the engine was closed; load it again")

    def _check(self, session: Session, request: StepRequest) -> None:
        self._loop.check_fits(
            positions_of(session, request, self.config.vocab_size, self.max_context)
        )


def _workers(threads: int | None) -> int:
    workers = jit.default_threads() if threads is None else threads
    if workers < 1:
        raise RequestError(f"threads must be at least 1, not {workers}")
    return workers
