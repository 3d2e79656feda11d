"""Our own engine as a contender."""

from __future__ import annotations

import time

from dspark_backend.bench.contender import ContenderSpec, Loaded, Sample, Turn
from dspark_backend.engine import DEFAULT_KV_BYTES, Engine
from dspark_backend.events import StepEvent, Tokens
from dspark_backend.request import ForcedMode, SamplingParams, StepKind, StepRequest
from dspark_backend.session import Session


class DSparkContender:
    """One session of an engine that serves nobody else."""

    def __init__(self, spec: ContenderSpec) -> None:
        began = time.perf_counter()
        self._engine = Engine.load(
            spec.model,
            device=spec.device,
            precision=spec.precision,
            threads=spec.threads,
            max_context=spec.max_context,
            # On: with what there is to speculate with; copies need no drafter.
            speculation=None if spec.speculation else False,
            drafter=spec.drafter,
            policy=spec.policy,
            signals=spec.signals,
            kv_bytes=DEFAULT_KV_BYTES if spec.kv_bytes is None else spec.kv_bytes,
        )
        self._session: Session | None = None
        self._forced = spec.forced
        self.loaded = Loaded(
            precision=self._engine.precision.value, load_s=time.perf_counter() - began
        )

    def start(self) -> None:
        if self._session is not None:
            self._session.close()
        self._session = self._engine.open_session()

    def turn(self, turn: Turn) -> Sample:
        if self._session is None:
            self._session = self._engine.open_session()
        return write(self._engine, self._session, turn, self._forced)

    def close(self) -> None:
        self._engine.close()


def write(
    engine: Engine,
    session: Session,
    turn: Turn,
    forced: ForcedMode = ForcedMode.CANONICAL,
) -> Sample:
    """One turn of a conversation that ``session`` holds, with its seconds by this thread's clock.

    Raises what :meth:`Engine.submit` and the step raise.
    """
    first: list[float] = []

    def note(event: StepEvent) -> None:
        if isinstance(event, Tokens) and not first:
            first.append(time.perf_counter())

    began = time.perf_counter()
    grammar = None if turn.spec is None else engine.compile(turn.spec)
    request = StepRequest(
        tokens=turn.tokens,
        max_new_tokens=turn.max_new_tokens,
        sampling=SamplingParams(temperature=turn.temperature, seed=turn.seed),
        grammar=grammar,
        forced=forced,
        kind=StepKind.TEXT if turn.spec is None else turn.spec.kind,
        explain=turn.explain,
    )
    outcome = engine.submit(session, request, on_event=note).result()
    ended = time.perf_counter()
    return Sample(
        token_ids=outcome.token_ids,
        text=outcome.text,
        ttft_s=(first[0] if first else ended) - began,
        total_s=ended - began,
        metrics=outcome.metrics,
        cycles=outcome.cycles,
    )
