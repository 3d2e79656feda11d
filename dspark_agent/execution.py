"""Running the tool calls of one step: checked, in parallel, each with its timeout."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Generic

import anyio
from pydantic import ValidationError

from dspark_agent.context import DepsT, RunContext
from dspark_agent.errors import ModelRetry, ToolFailed, ToolRetriesExceeded
from dspark_agent.function_schema import validation_text
from dspark_agent.messages import RetryPromptPart, ToolCallPart, ToolReturnPart
from dspark_agent.output import complaints
from dspark_agent.tools import Tool, ToolDefinition
from dspark_agent.trace import ToolTrace, unwatched

ToolPart = ToolReturnPart | RetryPromptPart
OnResult = Callable[[int, ToolPart, float], Awaitable[None]]
"""Told of each result as it comes: the call's place in the step, the result, its seconds."""
WatchCall = Callable[[ToolCallPart], AbstractContextManager[ToolTrace]]
"""Entered around each call; its trace gets the result."""


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

    async def run(
        self,
        calls: Sequence[ToolCallPart],
        *,
        offered: Mapping[str, ToolDefinition],
        ctx: RunContext[DepsT],
        count: RetryCount,
        on_result: OnResult,
        watch: WatchCall = unwatched,
    ) -> list[ToolPart]:
        """Run ``calls``; one result each, in order.

        Calls of one step run at the same time, but for those of ``sequential`` tools. ``offered``
        are the tools of this step by name, narrowed as the step narrows them: what does not fit
        is refused.

        Raises:
            ToolRetriesExceeded: a tool asked for more retries in a row than it has.
            Exception: whatever a tool raised other than ModelRetry and ToolFailed; the step's
                other calls are cancelled.
        """
        results: dict[int, ToolPart] = {}

        async def run_one(index: int) -> None:
            began = time.perf_counter()
            with watch(calls[index]) as trace:
                part = trace.part = await self._call(calls[index], offered, ctx, count)
            results[index] = part
            await on_result(index, part, time.perf_counter() - began)

        for batch in self._batches(calls):
            await _all([(run_one, index) for index in batch])
        ordered = [results[index] for index in range(len(calls))]
        self._count_retries(calls, ordered, count)
        return ordered

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

    async def _call(
        self,
        call: ToolCallPart,
        offered: Mapping[str, ToolDefinition],
        ctx: RunContext[DepsT],
        count: RetryCount,
    ) -> ToolPart:
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
        own_ctx = replace(
            ctx,
            retry=count.by_tool.get(call.tool_name, 0),
            max_retries=self._retries_of(call.tool_name),
            tool_name=call.tool_name,
            tool_call_id=call.tool_call_id,
        )
        try:
            return await self._return_of(tool, own_ctx, arguments, call, retry)
        except ModelRetry as error:
            return retry(error.message)
        except ToolFailed as error:
            return ToolReturnPart(
                tool_name=call.tool_name,
                content=error.message,
                tool_call_id=call.tool_call_id,
                outcome="failed",
            )

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
        self, calls: Sequence[ToolCallPart], parts: Sequence[ToolPart], count: RetryCount
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
