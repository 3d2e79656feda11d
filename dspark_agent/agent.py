"""An agent: a model, its tools, and what its answers must be."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from types import NoneType
from typing import (
    TYPE_CHECKING,
    Any,
    Generic,
    ParamSpec,
    Self,
    TypeVar,
    cast,
    overload,
)

import anyio
from typing_extensions import TypeVar as DefaultTypeVar
from typing_extensions import Unpack

from dspark_agent.compaction import Compaction
from dspark_agent.context import DepsT, RunContext
from dspark_agent.core import Core
from dspark_agent.declaration import Declaration
from dspark_agent.declaring import AgentOptions, Declaring
from dspark_agent.delegation import DelegateOptions, Handoff, agent_as_tool
from dspark_agent.errors import UserError
from dspark_agent.history import History
from dspark_agent.hooks import Hooks
from dspark_agent.journal.base import Journal
from dspark_agent.journal.record import recorded
from dspark_agent.limits import UsageLimits
from dspark_agent.messages import ModelRequest, ModelResponse
from dspark_agent.models import infer_model
from dspark_agent.models.base import Model
from dspark_agent.output import Output
from dspark_agent.outputs import OutputForm
from dspark_agent.relay import EventHandler
from dspark_agent.run import AgentRun, RunResult
from dspark_agent.run_options import ResumeOptions, RunOptions
from dspark_agent.session import Session
from dspark_agent.settings import ModelSettings
from dspark_agent.step import UNSET
from dspark_agent.stream import EventStream, streamed
from dspark_agent.tools import Tool
from dspark_agent.toolset import FunctionToolset

if TYPE_CHECKING:
    from typing_extensions import TypeForm

OutT = DefaultTypeVar("OutT", default=str)
T = TypeVar("T")
P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])


class Agent(Declaring[DepsT], Generic[DepsT, OutT]):
    """Declares what a model may do and must answer; runs it, or opens sessions of typed steps.

    Args:
        model: a :class:`Model`, or the name of one for the embedded engine. A name is loaded when
            it is first used; pass one Model object to several agents to load it once.
        output_type: a type that pydantic can validate, ``SomeType | str`` for a typed result or
            text, :class:`JsonSchema`, a function whose parameters the model fills in and whose
            return value is the output, :class:`ToolOutput`, :class:`NativeOutput`,
            :class:`PromptedOutput`, :class:`TextOutput`, or a choice of them (``|``, or a list).
        instructions: said to the model before anything else; see also :meth:`instructions`.
        deps_type: the type of ``deps``; documentation, type inference, and a check at run time.
        tools: functions or Tools. toolsets: shared sets of them. hooks: see :class:`Hooks`.
        compaction: how conversations are shortened that fill the model's context; without it, a
            step that does not fit is an error.
        model_settings: over the model's own.
        retries: how often in a row a tool may ask for a retry (tools may have their own), and,
            unless ``output_retries`` says otherwise, an output may be refused.
        tool_timeout: seconds one tool call may take, for tools without their own timeout.
        limits: of every run, and over the whole of a session.

    Raises:
        UserError: the declaration cannot work. SchemaError: neither can a tool's or output's type.
    """

    @overload
    def __init__(
        self: Agent[DepsT, str], model: Model | str, **options: Unpack[AgentOptions[DepsT]]
    ) -> None: ...
    @overload
    def __init__(
        self: Agent[DepsT, T],
        model: Model | str,
        *,
        output_type: TypeForm[T],
        **options: Unpack[AgentOptions[DepsT]],
    ) -> None: ...
    @overload
    def __init__(
        self: Agent[DepsT, T],
        model: Model | str,
        *,
        output_type: OutputForm[T] | Callable[..., Awaitable[T]],
        **options: Unpack[AgentOptions[DepsT]],
    ) -> None: ...
    @overload
    def __init__(
        self: Agent[DepsT, T],
        model: Model | str,
        *,
        output_type: Callable[..., T],
        **options: Unpack[AgentOptions[DepsT]],
    ) -> None: ...
    @overload
    def __init__(
        self: Agent[DepsT, Any],
        model: Model | str,
        *,
        output_type: Sequence[Any],
        **options: Unpack[AgentOptions[DepsT]],
    ) -> None: ...
    def __init__(
        self,
        model: Model | str,
        *,
        output_type: Any = str,
        instructions: str | Sequence[str] = (),
        deps_type: type[Any] = NoneType,
        name: str | None = None,
        tools: Sequence[Tool[DepsT] | Callable[..., Any]] = (),
        toolsets: Sequence[FunctionToolset[DepsT]] = (),
        hooks: Sequence[Hooks[DepsT]] = (),
        compaction: Compaction | None = None,
        model_settings: ModelSettings | None = None,
        retries: int = 1,
        output_retries: int | None = None,
        tool_timeout: float | None = None,
        limits: UsageLimits | None = None,
    ) -> None:
        self.model: Model = infer_model(model)
        self.name = name or "agent"
        self._declaration = Declaration(
            name=self.name,
            output=Output(output_type),
            deps_type=deps_type,
            own_tools=FunctionToolset(tools),
            toolsets=tuple(toolsets),
            settings=model_settings,
            retries=retries,
            output_retries=retries if output_retries is None else output_retries,
            tool_timeout=tool_timeout,
            limits=limits,
            instructions=[instructions] if isinstance(instructions, str) else list(instructions),
            hooks=tuple(hooks),
            compaction=compaction,
        )
        # Finds two tools of one name here, not in the first run.
        self._declaration.check_names(self._declaration.output)

    # -- at the service of others --------------------------------------------------------------

    def as_tool(self, *, description: str, **options: Unpack[DelegateOptions]) -> Tool[Any]:
        """This agent as a tool of another: a prompt in, its output out.

        Each call is a run of its own that is part of the caller's: the caller's limits, deadline
        and cancellation hold for it, what it uses counts there, and it gets the caller's deps (if
        it takes any). Where it comes to no answer (refused outputs, limits of its own), the
        caller's model is told so; the caller's own limits end the caller's run.

        ``description`` says to the caller's model what it is for. The other options are those of
        :class:`Tool`; ``name`` is the agent's own by default.
        """
        return agent_as_tool(self, description, options)

    # -- running -------------------------------------------------------------------------------

    @overload
    async def run(
        self, prompt: str | None = None, **options: Unpack[RunOptions[DepsT]]
    ) -> RunResult[OutT]: ...
    @overload
    async def run(
        self,
        prompt: str | None = None,
        *,
        output_type: TypeForm[T],
        **options: Unpack[RunOptions[DepsT]],
    ) -> RunResult[T]: ...
    @overload
    async def run(
        self,
        prompt: str | None = None,
        *,
        output_type: OutputForm[T],
        **options: Unpack[RunOptions[DepsT]],
    ) -> RunResult[T]: ...
    async def run(
        self,
        prompt: str | None = None,
        *,
        output_type: Any = UNSET,
        **options: Unpack[RunOptions[DepsT]],
    ) -> RunResult[Any]:
        """Steps with all the agent's tools until one gives the output; ``options`` are those of
        :class:`RunOptions`.

        Raises:
            DSparkError: see the errors under it. Whatever a tool raised, other than ModelRetry
                and ToolFailed, comes out as it is.
        """
        return await self._finished(prompt, output_type, options)

    @overload
    def run_sync(
        self, prompt: str | None = None, **options: Unpack[RunOptions[DepsT]]
    ) -> RunResult[OutT]: ...
    @overload
    def run_sync(
        self,
        prompt: str | None = None,
        *,
        output_type: TypeForm[T],
        **options: Unpack[RunOptions[DepsT]],
    ) -> RunResult[T]: ...
    @overload
    def run_sync(
        self,
        prompt: str | None = None,
        *,
        output_type: OutputForm[T],
        **options: Unpack[RunOptions[DepsT]],
    ) -> RunResult[T]: ...
    def run_sync(
        self,
        prompt: str | None = None,
        *,
        output_type: Any = UNSET,
        **options: Unpack[RunOptions[DepsT]],
    ) -> RunResult[Any]:
        """:meth:`run`, from code that is not async."""
        return anyio.run(partial(self.run, prompt, output_type=output_type, **options))

    @overload
    async def resume(
        self, run_id: str, *, journal: Journal, **options: Unpack[ResumeOptions[DepsT]]
    ) -> RunResult[OutT]: ...
    @overload
    async def resume(
        self,
        run_id: str,
        *,
        journal: Journal,
        output_type: TypeForm[T],
        **options: Unpack[ResumeOptions[DepsT]],
    ) -> RunResult[T]: ...
    @overload
    async def resume(
        self,
        run_id: str,
        *,
        journal: Journal,
        output_type: OutputForm[T],
        **options: Unpack[ResumeOptions[DepsT]],
    ) -> RunResult[T]: ...
    async def resume(
        self,
        run_id: str,
        *,
        journal: Journal,
        output_type: Any = UNSET,
        **options: Unpack[ResumeOptions[DepsT]],
    ) -> RunResult[Any]:
        """Go on with a run that a crash, an error or a pause has ended; its result, if it is done.

        What the journal has is not done again: the model is not asked, no finished tool is
        called. Output types, output validators and hooks are. The agent, ``output_type`` and
        ``deps`` are those that the run began with; ``limits`` count what is recorded, while
        ``wall_seconds`` begins anew.

        Raises:
            JournalError: there is no such run, or the agent has changed since it was recorded.
            JournalLockedError: another process (or task) is running it.
            ToolInterruptedError: a tool that is not idempotent was begun, and no end is recorded.
        """
        every = cast("RunOptions[DepsT]", {**options, "journal": journal, "run_id": run_id})
        return await self._finished(None, output_type, every, resume=True)

    def iter(
        self, prompt: str | None = None, **options: Unpack[RunOptions[DepsT]]
    ) -> AbstractAsyncContextManager[AgentRun[DepsT, OutT]]:
        """A run whose model turns the caller takes one by one:
        ``async with agent.iter("...") as run: async for step in run: ...``"""
        return self._driven(prompt, UNSET, options)

    def run_stream(
        self, prompt: str | None = None, **options: Unpack[RunOptions[DepsT]]
    ) -> AbstractAsyncContextManager[EventStream[OutT]]:
        """A run whose events the caller reads as they come:
        ``async with agent.run_stream("...") as stream: async for event in stream: ...``"""
        if options.get("on_event") is not None:
            raise UserError("run_stream gives the events itself; use run(on_event=...) instead")

        def start(
            handler: EventHandler,
        ) -> AbstractAsyncContextManager[AgentRun[DepsT, OutT]]:
            return self._driven(prompt, UNSET, options | {"on_event": handler})

        return streamed(start)

    def session(
        self,
        *,
        deps: DepsT | None = None,
        history: History | Sequence[ModelRequest | ModelResponse] | None = None,
        limits: UsageLimits | None = None,
        model: Model | str | None = None,
        model_settings: ModelSettings | None = None,
        on_event: EventHandler | None = None,
        parent: RunContext[Any] | None = None,
    ) -> Session[DepsT, OutT]:
        """A conversation of typed steps: ``async with agent.session() as s: await s.step("...")``.

        ``limits`` hold over the whole of the session; the agent's by default. The other keywords
        are those of :class:`RunOptions`.
        """
        options: RunOptions[Any] = {
            "model": model,
            "model_settings": model_settings,
            "on_event": on_event,
            "deps": deps,
            "parent": parent,
        }
        core = self._core(options, limits=limits or self._declaration.limits)
        return Session(core, History.of(history))

    async def _finished(
        self, prompt: str | None, output_type: Any, options: RunOptions[DepsT], resume: bool = False
    ) -> RunResult[Any]:
        async with self._driven(prompt, output_type, options, resume) as run:
            async for _ in run:
                pass
            return run.result

    @asynccontextmanager
    async def _driven(
        self,
        prompt: str | None,
        output_type: Any,
        options: RunOptions[DepsT],
        resume: bool = False,
    ) -> AsyncIterator[AgentRun[DepsT, Any]]:
        core = self._core(options, limits=None)
        limits = options.get("limits") or self._declaration.limits or UsageLimits()
        history = History.of(options.get("message_history"))
        results = options.get("deferred_tool_results")
        journal, run_id = options.get("journal"), options.get("run_id")
        if (journal is None) != (run_id is None):
            raise UserError("journal= and run_id= go together: where a run is kept, and its name")

        def successor(handoff: Handoff[DepsT]) -> Core[Any]:
            return handoff.agent._core(options, limits=None)

        run: AgentRun[DepsT, Any] | None = None
        async with recorded(journal, run_id, results) as record:
            if record is not None:
                prompt, history = await core.begin(record, prompt, history, resume)
            try:
                with core.work(limits) as work:
                    await core.open(history, output_type)
                    with core.watch.run() as trace:
                        run = AgentRun(core, work, prompt, output_type, results, successor)
                        yield run
                        trace.usage = core.usage.model_copy()
            finally:
                await (core if run is None else run.core).close()

    def _core(self, options: RunOptions[Any], *, limits: UsageLimits | None) -> Core[DepsT]:
        model = options.get("model")
        return Core(
            self._declaration,
            self.model if model is None else infer_model(model),
            deps=cast(DepsT, options.get("deps")),  # None is checked against deps_type
            settings=options.get("model_settings"),
            limits=limits,
            on_event=options.get("on_event"),
            parent=options.get("parent"),
        )

    # -- closing -------------------------------------------------------------------------------

    async def close(self) -> None:
        """Close the agent's model: its engine's memory and thread, or its connections."""
        await self.model.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()
