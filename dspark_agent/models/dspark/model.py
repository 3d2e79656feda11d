"""The model and its sessions. A conversation is a token log: each turn renders and computes only
what is new."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import anyio
import anyio.to_thread

from dspark_agent.errors import (
    ModelError,
)
from dspark_agent.limits import RequestUsage
from dspark_agent.messages import (
    ModelRequest,
    ModelResponse,
    ToolCallPart,
)
from dspark_agent.models.ahead import Ahead
from dspark_agent.models.base import (
    Emit,
    Model,
    ModelEvent,
    ModelSession,
    ModelTurn,
    TokensWritten,
)
from dspark_agent.models.bridge import ThreadBridge
from dspark_agent.models.chat import chat_messages, function_tools
from dspark_agent.models.dspark.translation import (
    finish_reason,
    forced_mode,
    model_event,
    sampling_params,
    step_metrics,
    translated_errors,
    turn_spec,
)
from dspark_agent.models.outline import ask_for_result
from dspark_agent.models.turn_reader import TurnReader
from dspark_agent.settings import ModelSettings
from dspark_agent.tools import ToolDefinition
from dspark_backend import errors as backend
from dspark_backend.engine import Engine
from dspark_backend.events import Failed, Finished, StepEvent, Tokens
from dspark_backend.grammar import events as parsed
from dspark_backend.request import FinishReason as EngineFinish
from dspark_backend.request import ForcedMode, StepOutcome, StepRequest, Urgency
from dspark_backend.session import Session as EngineSession

DEFAULT_MAX_TOKENS = 1024
"""New tokens of a turn whose settings do not say, where the context has room for them."""


class DSparkModel(Model):
    """A model on an engine in this process.

    The engine is loaded on first use (see :meth:`load`) and shared by everything that uses this
    object, so give several agents the same one.

    Args:
        model: a known name, a local folder or GGUF file, or a hub id.
        device: ``cpu`` (None), or ``cuda`` or ``cuda:N`` for a GPU.
        precision: as :meth:`Engine.load`; None takes what suits the model.
        threads: of the forward pass; None takes all cores.
        max_context: tokens a conversation may hold; None takes the engine's default.
        kv_bytes: memory for keys and values; None takes the engine's default.
        progress: called while a model is fetched and converted; see the engine's catalogue.
        engine: one that is already loaded; it stays the caller's to close.
        settings: this model's own defaults.
    """

    provider = "dspark"

    def __init__(
        self,
        model: str,
        *,
        device: str | None = None,
        precision: str | None = None,
        threads: int | None = None,
        max_context: int | None = None,
        kv_bytes: int | None = None,
        progress: Callable[[Any], None] | None = None,
        engine: Engine | None = None,
        settings: ModelSettings | None = None,
    ) -> None:
        self.settings = settings
        self._name = model
        options = {
            "device": device,
            "precision": precision,
            "threads": threads,
            "max_context": max_context,
            "kv_bytes": kv_bytes,
            "progress": progress,
        }
        self._options: dict[str, Any] = {k: v for k, v in options.items() if v is not None}
        self._engine = engine
        self._owns_engine = engine is None
        self._loading = threading.Lock()

    @property
    def name(self) -> str:
        return self._name

    async def load(self) -> Engine:
        """The engine, loaded (and the model fetched) if it was not yet.

        Raises:
            ModelNotFoundError: no such model, or no source of it can be reached.
            ModelError: its files are damaged or of an unsupported family, or the device is not
                there.
        """
        if self._engine is not None:
            return self._engine
        with translated_errors():
            return await anyio.to_thread.run_sync(self._load, abandon_on_cancel=True)

    def _load(self) -> Engine:
        with self._loading:
            if self._engine is None:
                self._engine = Engine.load(self._name, **self._options)
                # Agents nearly always constrain a turn. The tables for that hold the interpreter's
                # lock while they are built, which would halt the steps of others.
                self._engine.dialect.compiler.warm()
            return self._engine

    async def open(
        self, widest: ModelTurn, *, token_log: Sequence[int] | None = None
    ) -> ModelSession:
        engine = await self.load()
        with translated_errors():
            # Finds a schema that cannot be honoured before the first turn, and keeps the grammar.
            await anyio.to_thread.run_sync(lambda: engine.compile(turn_spec(widest)))
            # Agents may have one name, and share a model, without being the same.
            agent = (widest.agent, *widest.tool_names) if widest.agent else None
            opened = engine.open_session(agent)
            session = _DSparkSession(engine, self._name, widest.tools, opened)
            if token_log:
                await session.restore(tuple(token_log))
        return session

    async def close(self) -> None:
        """End the engine's thread and free its memory, unless the engine came from outside."""
        if self._owns_engine and self._engine is not None:
            engine, self._engine = self._engine, None
            await anyio.to_thread.run_sync(engine.close)


@dataclass(frozen=True, slots=True)
class _Prepared:
    request: StepRequest
    reader: TurnReader[parsed.TurnEvent]
    outlined: frozenset[str]
    compile_s: float


class _DSparkSession(ModelSession):
    """A token log on the engine. ``_outlined`` are the outlines of typed results that the log has
    told the model already; in ``_restored``, an earlier session's log as text, may be more."""

    def __init__(
        self,
        engine: Engine,
        model_name: str,
        tools: Sequence[ToolDefinition],
        session: EngineSession,
    ) -> None:
        self._engine = engine
        self._model_name = model_name
        self._tools = tuple(tools)
        self._session = session
        self._ahead = Ahead(engine, session)
        self._outlined: frozenset[str] = frozenset()
        self._restored = ""

    @property
    def token_log(self) -> tuple[int, ...]:
        return self._ahead.said

    async def restore(self, log: tuple[int, ...]) -> None:
        """Compute an earlier session's log, so that the first turn is as quick as it would have
        been there; the token that comes after it is not wanted. Closes the session on failure."""
        try:
            step = partial(self._engine.step, self._session, StepRequest(log, max_new_tokens=1))
            await anyio.to_thread.run_sync(step, abandon_on_cancel=True)
            self._session.rollback(len(self._session.tokens) - len(log))
        except BaseException:
            await self.close()  # ends the step, if it was abandoned
            raise
        self._restored = self._engine.tokenizer.decode(log)

    @property
    def context_window(self) -> int:
        return self._engine.max_context

    async def step(
        self, messages: Sequence[ModelRequest | ModelResponse], turn: ModelTurn, emit: Emit
    ) -> ModelResponse:
        mark, began = self.mark(), time.perf_counter()
        with translated_errors():
            prepared = await anyio.to_thread.run_sync(self._prepare, messages, turn)
            try:
                rest = await self._ahead.claim(prepared.request.tokens)
                prepared_s = time.perf_counter() - began
                request = replace(prepared.request, tokens=rest)
                outcome = await self._generate(request, prepared.reader, emit)
                if outcome.finish_reason is EngineFinish.CANCELLED:
                    raise ModelError("the step was ended from outside: was its engine closed?")
            except BaseException:
                with anyio.CancelScope(shield=True):
                    await self.rollback(mark)
                raise
        self._outlined = prepared.outlined
        usage = RequestUsage(
            input_tokens=len(self._session.tokens) - len(outcome.token_ids),
            cached_tokens=outcome.metrics.prefill_cached_tokens,
            output_tokens=len(outcome.token_ids),
        )
        parts = prepared.reader.parts()
        return ModelResponse(
            parts=parts,
            model_name=self._model_name,
            usage=usage,
            finish_reason=finish_reason(outcome, parts),
            metrics=step_metrics(outcome.metrics, prepared_s, prepared.compile_s),
        )

    def _prepare(
        self, messages: Sequence[ModelRequest | ModelResponse], turn: ModelTurn
    ) -> _Prepared:
        """Render what is new and compile the turn's grammar (in a worker thread)."""
        dialect, log = self._engine.dialect, self.token_log
        chat = chat_messages(messages)
        outlined = ask_for_result(chat, turn, self._outlined, self._restored)
        if log:
            tokens = dialect.render_next(chat, closed=log[-1] == dialect.end_of_turn_id)
        else:
            tokens = dialect.render_start(chat, function_tools(self._tools))
        spec = turn_spec(turn)
        began = time.perf_counter()
        grammar = self._engine.compile(spec)
        compile_s = time.perf_counter() - began
        room = self._engine.max_context - len(self._ahead.said) - len(tokens)
        request = StepRequest(
            tokens=tuple(tokens),
            max_new_tokens=turn.settings.get("max_tokens", max(1, min(DEFAULT_MAX_TOKENS, room))),
            sampling=sampling_params(turn.settings),
            grammar=grammar,
            forced=forced_mode(turn.settings),
            stop=tuple(turn.settings.get("stop_sequences", ())),
            kind=spec.kind,
            urgency=Urgency(turn.urgency),
            deadline_s=turn.deadline_s,
        )
        parser = None if grammar is None else dialect.parser(spec)
        return _Prepared(request, TurnReader(parser, model_event), outlined, compile_s)

    async def anticipate(self, calls: Sequence[ToolCallPart], turn: ModelTurn) -> None:
        with suppress(backend.BackendError):  # the turn itself will say what is wrong
            await self._ahead.anticipate(calls[0])
            await anyio.to_thread.run_sync(self._warm, turn, abandon_on_cancel=True)

    def _warm(self, turn: ModelTurn) -> None:
        """Compile what the turn will be constrained with; compiled grammars are kept."""
        grammar = self._engine.compile(turn_spec(turn))
        if grammar is not None:
            grammar.matcher(canonical=forced_mode(turn.settings) is ForcedMode.CANONICAL)

    async def _generate(
        self, request: StepRequest, reader: TurnReader[parsed.TurnEvent], emit: Emit
    ) -> StepOutcome:
        """Run the step on the engine's thread; its events arrive here as they happen."""
        bridge = ThreadBridge[StepEvent]()
        handle = self._engine.submit(self._session, request, on_event=bridge.put)
        running = True
        try:
            while True:
                for event in await bridge.get_all():
                    match event:
                        case Tokens(token_ids, text, source):
                            await emit(TokensWritten(len(token_ids), source, text))
                            await _send(reader.feed(text), emit)
                        case Finished(outcome):
                            running = False
                            await _send(reader.end(), emit)
                            return outcome
                        case Failed(error):
                            running = False
                            raise error
        finally:
            if running:  # cancelled from outside, or a listener failed: stop the token loop now
                handle.cancel()
                with anyio.CancelScope(shield=True):
                    await _ended(bridge)

    def mark(self) -> object:
        return len(self._ahead.said), self._outlined

    async def rollback(self, mark: object) -> None:
        assert isinstance(mark, tuple)
        length, self._outlined = mark
        await self._ahead.drop()
        surplus = len(self._session.tokens) - length
        if surplus:
            self._session.rollback(surplus)

    async def fork(self) -> ModelSession:
        await self._ahead.settle()
        child = copy.copy(self)
        child._session = self._session.fork()
        child._ahead = Ahead(self._engine, child._session, self._ahead.tokens)
        return child

    async def close(self) -> None:
        self._session.close()


async def _send(events: Sequence[ModelEvent], emit: Emit) -> None:
    for event in events:
        await emit(event)


async def _ended(bridge: ThreadBridge[StepEvent]) -> None:
    """Wait until the engine has let go of the step."""
    while not any(isinstance(event, Finished | Failed) for event in await bridge.get_all()):
        pass
