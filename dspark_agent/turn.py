"""One model turn and the execution of the tool calls it made."""

from __future__ import annotations

import inspect
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic

from dspark_agent import budget
from dspark_agent.budget import Budget
from dspark_agent.context import DepsT, RunContext
from dspark_agent.conversation import Conversation
from dspark_agent.errors import ModelRetry, OutputError
from dspark_agent.events import StepEnd, StepStart, ToolResult
from dspark_agent.execution import ToolPart, ToolRunner
from dspark_agent.limits import RunUsage
from dspark_agent.messages import FinishReason, ModelResponse, RetryPromptPart
from dspark_agent.models.base import ModelSession, ModelTurn
from dspark_agent.observer import Watch
from dspark_agent.relay import EventHandler, EventRelay
from dspark_agent.settings import ModelSettings, merge_settings
from dspark_agent.step import UNSET, StepPlan, StepResult, Unset
from dspark_agent.trace import StepTrace


@dataclass(frozen=True, slots=True)
class TurnTaker(Generic[DepsT]):
    """Takes turns of one conversation: what stays the same from turn to turn."""

    model: ModelSession
    runner: ToolRunner[DepsT]
    handler: EventHandler | None
    usage: RunUsage
    watch: Watch

    async def take(
        self,
        conversation: Conversation,
        plan: StepPlan,
        *,
        ctx: RunContext[DepsT],
        budgets: Sequence[Budget],
        attempt: int,
    ) -> StepResult[Any]:
        """Let the model write once, run its calls or check its output, and record the step.

        ``attempt`` counts from 1. The result's ``retry_reason`` is set where the step should be
        taken again; the reason is then part of the conversation.

        Raises:
            UsageLimitExceeded: before the model is asked, or before its tools are run.
            OutputError: the output was refused ``plan.retries`` times already.
            ToolRetriesExceeded: a tool was.
        """
        with self.watch.step(len(conversation.steps), plan.kind, attempt) as trace:
            return await self._take(conversation, plan, ctx, budgets, trace)

    async def _take(
        self,
        conversation: Conversation,
        plan: StepPlan,
        ctx: RunContext[DepsT],
        budgets: Sequence[Budget],
        trace: StepTrace,
    ) -> StepResult[Any]:
        index, attempt = trace.index, trace.attempt
        relay = EventRelay(self.handler, trace, plan.output)
        budget.check_request(budgets, self.usage)
        turn = self._turn(conversation, plan, budgets)
        await relay.send(StepStart(index, plan.kind, attempt))
        with self.watch.turn(trace, conversation.unsent, turn):
            response = await self.model.step(conversation.unsent, turn, relay.on_model)
            trace.response, trace.model_ended = response, time.perf_counter()
        conversation.heard(response)
        self.usage.add_turn(response.usage)
        ctx = replace(ctx, messages=tuple(conversation.messages))

        value: Any = UNSET
        reason: str | None = None
        parts: list[ToolPart] = []
        tools_began = time.perf_counter()
        if response.tool_calls:
            parts = await self._run_calls(conversation, turn, ctx, budgets, relay, trace)
            reason = _refusal(parts)
            conversation.ask(*parts)
            tool_s = time.perf_counter() - tools_began
        else:
            value, reason = await self._check_output(response, plan, ctx, attempt)
            tool_s = 0.0
            if reason is not None:
                conversation.ask(RetryPromptPart(content=reason))
        metrics = response.metrics.closed(total_s=time.perf_counter() - trace.began, tool_s=tool_s)
        trace.metrics, trace.retry_reason = metrics, reason
        result: StepResult[Any] = StepResult(
            index=index,
            kind=plan.kind,
            response=response,
            tool_results=tuple(parts),
            metrics=metrics,
            attempts=attempt,
            retry_reason=reason,
            value=value,
            trace=trace,
        )
        conversation.steps.append(result)
        await relay.send(StepEnd(index, result))
        return result

    def _turn(
        self, conversation: Conversation, plan: StepPlan, budgets: Sequence[Budget]
    ) -> ModelTurn:
        barred = conversation.repeats.barred(budget.repeat_call_limit(budgets))
        tools = tuple(tool for tool in plan.tools if tool.name not in barred)
        if plan.needs_call and not tools:
            tools = plan.tools  # the step's only way on stays open
        settings = _settings(conversation, plan.settings)
        limit = budget.output_tokens_left(budgets, self.usage)
        if limit is not None:
            settings["max_tokens"] = min(limit, settings.get("max_tokens", limit))
        return replace(replace(plan, tools=tools).turn, settings=settings)

    async def _run_calls(
        self,
        conversation: Conversation,
        turn: ModelTurn,
        ctx: RunContext[DepsT],
        budgets: Sequence[Budget],
        relay: EventRelay,
        trace: StepTrace,
    ) -> list[ToolPart]:
        assert trace.response is not None
        calls = trace.response.tool_calls
        budget.check_tool_calls(budgets, self.usage, len(calls))
        notes = conversation.repeats.record(calls)

        async def on_result(index: int, part: ToolPart, seconds: float) -> None:
            noted = part.model_copy(update={"note": notes[index]})
            await relay.send(ToolResult(relay.step, index, noted, seconds))

        parts = await self.runner.run(
            calls,
            offered={tool.name: tool for tool in turn.tools},
            ctx=ctx,
            count=conversation.retries,
            on_result=on_result,
            watch=partial(self.watch.tool, trace),
        )
        self.usage.tool_calls += len(calls)
        return [
            part.model_copy(update={"note": note}) for part, note in zip(parts, notes, strict=True)
        ]

    async def _check_output(
        self, response: ModelResponse, plan: StepPlan, ctx: RunContext[DepsT], attempt: int
    ) -> tuple[Any | Unset, str | None]:
        try:
            return await self._output(response, plan, replace(ctx, retry=attempt - 1)), None
        except ModelRetry as error:
            reason = error.message
        if response.finish_reason is FinishReason.LENGTH:
            reason = f"The answer was cut off at the token limit; be shorter. {reason}"
        if attempt > plan.retries:
            raise OutputError(reason, text=response.text, attempts=attempt)
        return UNSET, reason

    async def _output(self, response: ModelResponse, plan: StepPlan, ctx: RunContext[DepsT]) -> Any:
        if plan.needs_call:
            raise ModelRetry("This step needs a tool call, not an answer.")
        if not response.text.strip():
            raise ModelRetry("The answer was empty.")
        output = plan.output.validate(response.text)
        for validator in plan.validators:
            output = await call_with_ctx(validator, ctx, output)
        return output


async def call_with_ctx(function: Callable[..., Any], ctx: RunContext[Any], *args: Any) -> Any:
    """Call ``function(ctx, *args)``, or ``function(*args)`` where it takes no context; await the
    answer if it is awaitable."""
    takes = len(inspect.signature(function).parameters)
    answer = function(ctx, *args) if takes > len(args) else function(*args)
    if isinstance(answer, Awaitable):
        return await answer
    return answer


def _settings(conversation: Conversation, given: ModelSettings) -> ModelSettings:
    """The turn's own settings: another temperature and seed after a refusal, if one is given."""
    settings = merge_settings(given)
    again = settings.pop("retry_temperature", None)
    steps = conversation.steps
    if again is not None and steps and steps[-1].retry_reason is not None:
        settings["temperature"] = again
        settings["seed"] = settings.get("seed", 0) + len(steps)
    return settings


def _refusal(parts: Sequence[ToolPart]) -> str | None:
    """Why the step should be taken again: every one of its calls asked for it."""
    refusals = [part.content for part in parts if isinstance(part, RetryPromptPart)]
    return "\n".join(refusals) if len(refusals) == len(parts) else None
