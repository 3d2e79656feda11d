"""Running the tool calls of one step: checked, in parallel, each with its timeout."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Generic

import anyio
import pydantic_core
from pydantic import ValidationError

from dspark_agent import hooks
from dspark_agent.context import DepsT, RunContext
from dspark_agent.deferred import AwaitsApproval
from dspark_agent.errors import (
    ApprovalRequired,
    ModelRetry,
    ToolFailed,
    ToolRetriesExceeded,
    UserError,
)
from dspark_agent.function_schema import validation_text
from dspark_agent.hooks import Hooks
from dspark_agent.journal.calls import CallLedger
from dspark_agent.json_schema import complaints
from dspark_agent.messages import RetryPromptPart, ToolCallPart, ToolReturnPart
from dspark_agent.tools import Tool, ToolDefinition
from dspark_agent.trace import ToolTrace, unwatched

ToolPart = ToolReturnPart | RetryPromptPart
CallOutcome = ToolPart | AwaitsApproval
OnResult = Callable[[int, ToolPart, float], Awaitable[None]]
"""Told of each result as it comes: the call's place in the step, the result, its seconds."""
Begins = Callable[[ToolCallPart], Awaitable[None]]
"""Told of a call when nothing is left to check and the tool is about to run."""
WatchCall = Callable[[ToolCallPart], AbstractContextManager[ToolTrace]]
"""Entered around each call; its trace gets the result."""
EarlyResult = Callable[[int, ToolCallPart], Awaitable[tuple[CallOutcome, float] | None]]
"""What came of a call that was started before its turn was over, and the seconds it took; None
where it was not. Takes the call's place among those run together."""


@dataclass(slots=True)
class RetryCount:
    """How often in a row each tool has asked for a retry."""

    by_tool: dict[str, int] = field(default_factory=dict)

    def copy(self) -> RetryCount:
        return RetryCount(dict(self.by_tool))


@dataclass(frozen=True, slots=True)
class ToolRunner(Generic[DepsT]):
    """Runs calls of an agent's tools.

    ``retries`` and ``timeout`` (seconds) hold for tools that have none of their own.
    """

    tools: Mapping[str, Tool[DepsT]]
    retries: int = 1
    timeout: float | None = None
    hooks: tuple[Hooks[DepsT], ...] = ()

    async def run(
        self,
        calls: Sequence[ToolCallPart],
        *,
        offered: Mapping[str, ToolDefinition],
        ctx: RunContext[DepsT],
        count: RetryCount,
        on_result: OnResult,
        ledger: CallLedger | None = None,
        watch: WatchCall = unwatched,
        early: EarlyResult | None = None,
    ) -> list[CallOutcome]:
        """Run ``calls``, but for those that run ``early`` already; one outcome each, in order.

        Calls of one step run at the same time, but for those of ``sequential`` tools. ``offered``
        are the tools of this step by name, narrowed as the step narrows them: what does not fit
        is refused. Calls that need approval are not run, unless ``ctx.tool_call_approved``. Calls
        that ``ledger`` has the outcome of are not run again.

        Raises:
            ToolRetriesExceeded: a tool asked for more retries in a row than it has.
            ToolInterruptedError: ``ledger`` has the begin of a call and not its end.
            Exception: whatever a tool raised other than ModelRetry, ToolFailed and
                ApprovalRequired; the step's other calls are cancelled.
        """
        outcomes: dict[int, CallOutcome] = {}
        if ledger is not None:
            calls = await ledger.resumed(calls, self.tools)

        async def run_one(index: int) -> None:
            known = None if early is None else await early(index, calls[index])
            if known is None:
                began = time.perf_counter()
                run = partial(self._recorded, index, calls[index], offered, ctx, count, ledger)
                known = await _watched(watch, calls[index], run), time.perf_counter() - began
            outcome, seconds = known
            outcomes[index] = outcome
            if not isinstance(outcome, AwaitsApproval):
                await on_result(index, outcome, seconds)

        for batch in self._batches(calls):
            await _all([(run_one, index) for index in batch])
        ordered = [outcomes[index] for index in range(len(calls))]
        self._count_retries(calls, ordered, count)
        return ordered

    def may_start_early(self, call: ToolCallPart) -> bool:
        """Whether ``call`` may run before the turn that made it is over.

        Not where a hook sees the whole turn first, nor where it may have to wait for approval.
        """
        tool = self.tools.get(call.tool_name)
        if tool is None or self.hooks:
            return False
        return not tool.sequential and tool.requires_approval is False

    def _batches(self, calls: Sequence[ToolCallPart]) -> Iterator[list[int]]:
        batch: list[int] = []
        for index, call in enumerate(calls):
            tool = self.tools.get(call.tool_name)
            if tool is not None and tool.sequential:
                if batch:
                    yield batch
                yield [index]
                batch = []
            else:
                batch.append(index)
        if batch:
            yield batch

    async def start_early(
        self,
        call: ToolCallPart,
        offered: Mapping[str, ToolDefinition],
        ctx: RunContext[DepsT],
        count: RetryCount,
        watch: WatchCall,
    ) -> CallOutcome:
        """Run one call of a turn that goes on; see :meth:`run`."""
        run = partial(self._recorded, 0, call, offered, ctx, count, None)
        return await _watched(watch, call, run)

    async def _recorded(
        self,
        index: int,
        call: ToolCallPart,
        offered: Mapping[str, ToolDefinition],
        ctx: RunContext[DepsT],
        count: RetryCount,
        ledger: CallLedger | None,
    ) -> CallOutcome:
        """One call, unless the journal has what came of it."""
        ctx = replace(
            ctx,
            retry=count.by_tool.get(call.tool_name, 0),
            max_retries=self._retries_of(call.tool_name),
            tool_name=call.tool_name,
            tool_call_id=call.tool_call_id,
        )
        if ledger is None:
            return await self._hooked(call, offered, ctx, _nothing)
        known = ledger.outcome(index)
        if known is not None:
            return known
        begins = partial(ledger.begins, index)
        return await ledger.ends(index, call, await self._hooked(call, offered, ctx, begins))

    async def _hooked(
        self,
        call: ToolCallPart,
        offered: Mapping[str, ToolDefinition],
        ctx: RunContext[DepsT],
        begins: Begins,
    ) -> CallOutcome:
        """One call with the hooks around it; one that waits for approval has only those before."""
        try:
            try:
                hooked = await hooks.before_tool(self.hooks, ctx, call)
            except ApprovalRequired as error:
                return _awaits(call, error, ctx)
            outcome = await self._call(hooked, offered, ctx, begins)
            if isinstance(outcome, AwaitsApproval):
                return outcome
            return await hooks.after_tool(self.hooks, ctx, hooked, outcome)
        except ModelRetry as error:
            return RetryPromptPart(
                content=error.message, tool_name=call.tool_name, tool_call_id=call.tool_call_id
            )
        except ToolFailed as error:
            return _failed(call, error)

    async def _call(
        self,
        call: ToolCallPart,
        offered: Mapping[str, ToolDefinition],
        ctx: RunContext[DepsT],
        begins: Begins,
    ) -> CallOutcome:
        def retry(reason: str) -> RetryPromptPart:
            return RetryPromptPart(
                content=reason, tool_name=call.tool_name, tool_call_id=call.tool_call_id
            )

        tool = self.tools.get(call.tool_name)
        if tool is None or call.tool_name not in offered:
            there_are = ", ".join(offered) or "none"
            return retry(f"There is no tool {call.tool_name!r} in this step. Tools: {there_are}.")
        try:
            arguments = tool.schema.validate(call.args)
        except ValidationError as error:
            return retry(f"Wrong arguments for {call.tool_name}:\n{validation_text(error)}")
        narrowed = offered[call.tool_name].parameters
        if narrowed is not tool.schema.parameters and (found := complaints(narrowed, call.args)):
            return retry("\n".join(["Wrong arguments for this step:", *found]))
        if not ctx.tool_call_approved and await tool.needs_approval(ctx, arguments):
            return AwaitsApproval(call=call)
        await begins(call)
        try:
            return await self._return_of(tool, ctx, arguments, call, retry)
        except ModelRetry as error:
            return retry(error.message)
        except ApprovalRequired as error:
            return _awaits(call, error, ctx)
        except ToolFailed as error:
            return _failed(call, error)

    async def _return_of(
        self,
        tool: Tool[DepsT],
        ctx: RunContext[DepsT],
        arguments: Mapping[str, Any],
        call: ToolCallPart,
        retry: Callable[[str], RetryPromptPart],
    ) -> ToolPart:
        timeout = self.timeout if tool.timeout is None else tool.timeout
        with anyio.move_on_after(timeout) as scope:
            content = await tool.run(ctx, arguments)
            return ToolReturnPart(
                tool_name=call.tool_name, content=content, tool_call_id=call.tool_call_id
            )
        assert scope.cancelled_caught
        return retry(f"{call.tool_name} took longer than {timeout:g} s and was stopped.")

    def _retries_of(self, name: str) -> int:
        tool = self.tools.get(name)
        return self.retries if tool is None or tool.retries is None else tool.retries

    def _count_retries(
        self, calls: Sequence[ToolCallPart], parts: Sequence[CallOutcome], count: RetryCount
    ) -> None:
        refused = {
            call.tool_name: part.content
            for call, part in zip(calls, parts, strict=True)
            if isinstance(part, RetryPromptPart)
        }
        for name in {call.tool_name for call in calls} - refused.keys():
            count.by_tool.pop(name, None)
        for name, reason in refused.items():
            count.by_tool[name] = count.by_tool.get(name, 0) + 1
            if count.by_tool[name] > self._retries_of(name):
                raise ToolRetriesExceeded(name, reason, retries=self._retries_of(name))


async def _watched(
    watch: WatchCall, call: ToolCallPart, run: Callable[[], Awaitable[CallOutcome]]
) -> CallOutcome:
    with watch(call) as trace:
        outcome = trace.outcome = await run()
    return outcome


async def _nothing(call: ToolCallPart) -> None:
    """What the begin of a call means where nobody keeps a ledger."""


def _failed(call: ToolCallPart, error: ToolFailed) -> ToolReturnPart:
    return ToolReturnPart(
        tool_name=call.tool_name,
        content=error.message,
        tool_call_id=call.tool_call_id,
        outcome="failed",
    )


def _awaits(call: ToolCallPart, asked: ApprovalRequired, ctx: RunContext[Any]) -> AwaitsApproval:
    if ctx.tool_call_approved:
        raise UserError(
            f"tool {call.tool_name!r} raised ApprovalRequired for a call that was approved; look "
            "at ctx.tool_call_approved first"
        )
    try:
        metadata = pydantic_core.to_jsonable_python(asked.metadata)
    except ValueError as error:  # pydantic's own is one, and bytes that are no text are another
        raise UserError(
            f"tool {call.tool_name!r}: the metadata of ApprovalRequired is no JSON: {error}"
        ) from error
    return AwaitsApproval(call=call, metadata=metadata)


async def _all(jobs: Sequence[tuple[Callable[[int], Awaitable[None]], int]]) -> None:
    """Run all jobs at the same time; the first exception cancels the others and is raised bare."""
    failure: list[Exception] = []

    async def guarded(job: Callable[[int], Awaitable[None]], index: int) -> None:
        try:
            await job(index)
        except Exception as error:
            failure.append(error)
            group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        for job, index in jobs:
            group.start_soon(guarded, job, index)
    if failure:
        raise failure[0]
