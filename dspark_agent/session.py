"""A conversation with an agent, one typed step at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Self, overload

from typing_extensions import TypeVar

from dspark_agent.asking import ask
from dspark_agent.branching import fork
from dspark_agent.context import DepsT
from dspark_agent.conversation import Conversation
from dspark_agent.core import Core
from dspark_agent.deferred import DeferredToolResults
from dspark_agent.events import ContextCompacted
from dspark_agent.history import History
from dspark_agent.limits import RunUsage, UsageLimits
from dspark_agent.messages import ModelRequest, ModelResponse
from dspark_agent.outputs import OutputForm
from dspark_agent.run import AgentRun, RunResult
from dspark_agent.settings import ModelSettings
from dspark_agent.step import UNSET, StepResult
from dspark_agent.trace import StepTrace

if TYPE_CHECKING:
    from typing_extensions import TypeForm

OutT = TypeVar("OutT", default=str)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SessionMark:
    """Where a session stood; see :meth:`Session.mark`."""

    conversation: Conversation
    model_mark: object
    epoch: int


class Session(Generic[DepsT, OutT]):
    """A conversation: made by :meth:`Agent.session`, used as an async context manager.

    A step that fails or is cancelled leaves the session as it was before the step. One step at a
    time; :meth:`fork` for more. ``usage`` is what the session has used, failed steps included.
    """

    def __init__(self, core: Core[DepsT], history: History) -> None:
        self._core = core
        self._history = history

    # -- what was said -------------------------------------------------------------------------

    @property
    def usage(self) -> RunUsage:
        """What the session has used so far, steps that failed included."""
        return self._core.usage

    @property
    def messages(self) -> tuple[ModelRequest | ModelResponse, ...]:
        """The conversation so far, a history it was resumed from included."""
        return tuple(self._core.conversation.messages)

    @property
    def steps(self) -> tuple[StepResult[Any], ...]:
        """The model turns of this session, in order; refused ones included."""
        return tuple(self._core.conversation.steps)

    @property
    def compactions(self) -> tuple[ContextCompacted, ...]:
        """Every time the conversation was shortened; see :class:`Compaction`."""
        return tuple(self._core.conversation.compactions)

    @property
    def history(self) -> History:
        """The conversation as a value that serialises, to go on from later."""
        return self._core.history()

    # -- steps ---------------------------------------------------------------------------------

    @overload
    async def step(
        self,
        prompt: str | None = None,
        *,
        tools: Sequence[str] | None = None,
        tool_choice: str | None = None,
        args: Mapping[str, Any] | None = None,
        settings: ModelSettings | None = None,
        limits: UsageLimits | None = None,
        retries: int | None = None,
        deferred_tool_results: DeferredToolResults | None = None,
    ) -> StepResult[OutT]: ...
    @overload
    async def step(
        self,
        prompt: str | None = None,
        *,
        output_type: TypeForm[T],
        tools: Sequence[str] | None = None,
        tool_choice: str | None = None,
        args: Mapping[str, Any] | None = None,
        settings: ModelSettings | None = None,
        limits: UsageLimits | None = None,
        retries: int | None = None,
        deferred_tool_results: DeferredToolResults | None = None,
    ) -> StepResult[T]: ...
    @overload
    async def step(
        self,
        prompt: str | None = None,
        *,
        output_type: OutputForm[T],
        tools: Sequence[str] | None = None,
        tool_choice: str | None = None,
        args: Mapping[str, Any] | None = None,
        settings: ModelSettings | None = None,
        limits: UsageLimits | None = None,
        retries: int | None = None,
        deferred_tool_results: DeferredToolResults | None = None,
    ) -> StepResult[T]: ...
    async def step(
        self,
        prompt: str | None = None,
        *,
        output_type: Any = UNSET,
        tools: Sequence[str] | None = None,
        tool_choice: str | None = None,
        args: Mapping[str, Any] | None = None,
        settings: ModelSettings | None = None,
        limits: UsageLimits | None = None,
        retries: int | None = None,
        deferred_tool_results: DeferredToolResults | None = None,
    ) -> StepResult[Any]:
        """One model turn, and the tool calls it made.

        What the turn may emit: with ``output_type`` alone, that output and no tool call; with
        ``tool_choice="name"``, exactly that call; with ``tools=[...]``, those tools or the
        agent's output; with none of these, any of the agent's tools or its output.

        A refused output, or a step all of whose calls asked for a retry, is taken again with the
        same choice and the reason in the conversation: outputs up to ``retries`` times, tools up
        to their own.

        Args:
            prompt: what to say first; None where tool results (or a history) wait for an answer.
            output_type: a type, ``SomeType | str`` (typed result or text), or a JsonSchema.
            tools: names of the tools to choose from; ``[]`` for none.
            tool_choice: ``auto``, ``required``, ``none``, or a tool's name.
            args: arguments of the named tool that are decided already: a value, or a JsonSchema
                that leaves the model less to choose, such as ``JsonSchema({"enum": paths})``.
            settings: over those of session, agent and model.
            limits: for this step alone, within the session's.
            retries: how often a refused output is asked for again; None takes the agent's.
            deferred_tool_results: decisions about the calls that the step before left waiting.
                The calls' results stand even where this step fails.

        Raises:
            OutputError: the output was refused more often than ``retries``.
            ToolRetriesExceeded: a tool asked for more retries in a row than it has.
            UsageLimitExceeded, DeadlineExceeded, RunCancelled, ModelError: as their names say.
        """
        core = self._core
        plan = core.plan(
            output_type=output_type,
            tools=tools,
            tool_choice=tool_choice,
            args=args,
            settings=settings,
            retries=retries,
        )
        with core.work(limits) as work:
            settled: StepTrace | None = None
            if deferred_tool_results is not None:
                settled = await core.settle(deferred_tool_results, work)

            async def turns() -> StepResult[Any]:
                await ask(core, prompt, work)
                result = await core.take(plan, work, 1, settled)
                while result.retry_reason is not None:
                    result = await core.take(plan, work, result.attempts + 1)
                return result

            return await core.committed(work, turns)

    @overload
    async def run(
        self,
        prompt: str | None = None,
        *,
        limits: UsageLimits | None = None,
        deferred_tool_results: DeferredToolResults | None = None,
    ) -> RunResult[OutT]: ...
    @overload
    async def run(
        self,
        prompt: str | None = None,
        *,
        output_type: TypeForm[T],
        limits: UsageLimits | None = None,
        deferred_tool_results: DeferredToolResults | None = None,
    ) -> RunResult[T]: ...
    @overload
    async def run(
        self,
        prompt: str | None = None,
        *,
        output_type: OutputForm[T],
        limits: UsageLimits | None = None,
        deferred_tool_results: DeferredToolResults | None = None,
    ) -> RunResult[T]: ...
    async def run(
        self,
        prompt: str | None = None,
        *,
        output_type: Any = UNSET,
        limits: UsageLimits | None = None,
        deferred_tool_results: DeferredToolResults | None = None,
    ) -> RunResult[Any]:
        """Steps with all the agent's tools until one gives the output.

        ``limits`` count for this run, within the session's; the agent's by default. A failing
        step is undone, the steps before it stand. ``deferred_tool_results`` as in :meth:`step`.

        Raises:
            DSparkError: as :meth:`step`.
        """
        limits = limits or self._core.declaration.limits or UsageLimits()
        with self._core.work(limits) as work, self._core.watch.run() as trace:
            run: AgentRun[DepsT, Any] = AgentRun(
                self._core, work, prompt, output_type, deferred_tool_results
            )
            async for _ in run:
                pass
            trace.usage = run.result.usage
        return run.result

    # -- copies --------------------------------------------------------------------------------

    def mark(self) -> SessionMark:
        """Where the session stands, to :meth:`rollback` to."""
        core = self._core
        return SessionMark(core.conversation.copy(), core.model_session.mark(), core.epoch)

    async def rollback(self, mark: SessionMark) -> None:
        """Forget everything since ``mark`` (what tools did outside stays done)."""
        await self._core.rollback(mark.conversation, mark.model_mark, mark.epoch)

    async def fork(self, *, shares_limits: bool = False) -> Session[DepsT, OutT]:
        """An independent session that starts with all that was said in this one.

        On the embedded model it shares this one's KV. Close it, or use it with ``async with``.
        With ``shares_limits`` what it uses counts in this session's ``usage`` too, and this
        session's limits and deadline hold for it; without, the limits begin anew.
        """
        return Session(await fork(self._core, shares_limits=shares_limits), self._history)

    async def close(self) -> None:
        """Free what the session holds in the model. Idempotent."""
        await self._core.close()

    async def __aenter__(self) -> Self:
        if not self._core.is_open:
            await self._core.open(self._history)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()
