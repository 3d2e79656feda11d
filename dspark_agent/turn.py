"""One model turn and the execution of the tool calls it made."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic

from dspark_agent import budget, hooks
from dspark_agent.answer import Answer, AnswerCheck, too_early
from dspark_agent.budget import Budget
from dspark_agent.context import DepsT, RunContext
from dspark_agent.conversation import Conversation
from dspark_agent.deferred import AwaitsApproval, DeferredToolRequests
from dspark_agent.errors import UserError
from dspark_agent.events import StepEnd, StepStart, ToolResult
from dspark_agent.execution import CallOutcome, ToolPart, ToolRunner
from dspark_agent.hooks import Hooks
from dspark_agent.journal.record import RunRecord
from dspark_agent.journal.session import RecordedSession
from dspark_agent.limits import RunUsage
from dspark_agent.messages import RetryPromptPart
from dspark_agent.metrics import StepMetrics
from dspark_agent.models.base import ModelSession, ModelTurn
from dspark_agent.observer import Watch
from dspark_agent.relay import EventHandler, EventRelay
from dspark_agent.settings import ModelSettings, merge_settings
from dspark_agent.step import UNSET, StepPlan, StepResult
from dspark_agent.trace import StepTrace


@dataclass(frozen=True, slots=True)
class TurnTaker(Generic[DepsT]):
    """Takes turns of one conversation: what stays the same from turn to turn."""

    model: ModelSession
    runner: ToolRunner[DepsT]
    handler: EventHandler | None
    usage: RunUsage
    watch: Watch
    hooks: tuple[Hooks[DepsT], ...] = ()
    record: RunRecord | None = None

    async def take(
        self,
        conversation: Conversation,
        plan: StepPlan,
        *,
        ctx: RunContext[DepsT],
        budgets: Sequence[Budget],
        attempt: int,
        settled: StepTrace | None = None,
    ) -> StepResult[Any]:
        """Let the model write once, run its calls or check its output, and record the step.

        ``attempt`` counts from 1. The result's ``retry_reason`` is set where the step should be
        taken again; the reason is then part of the conversation. ``settled`` is the trace of
        calls of the step before this one, which had waited for approval.

        Raises:
            UserError: a tool needs approval, and the step's output has no place for the request.
            UsageLimitExceeded: before the model is asked, or before its tools are run.
            OutputError: the output was refused ``plan.retries`` times already.
            ToolRetriesExceeded: a tool was.
            GuardrailTripped: an output guard stopped the run.
        """
        with self.watch.step(len(conversation.steps), plan.kind, attempt) as trace:
            return await self._take(conversation, plan, ctx, budgets, trace, settled)

    async def _take(
        self,
        conversation: Conversation,
        plan: StepPlan,
        ctx: RunContext[DepsT],
        budgets: Sequence[Budget],
        trace: StepTrace,
        settled: StepTrace | None,
    ) -> StepResult[Any]:
        index, attempt = trace.index, trace.attempt
        relay = EventRelay(self.handler, index, plan.output, trace)
        budget.check_request(budgets)
        self._check_can_pause(plan)
        turn = await hooks.before_model(self.hooks, ctx, self._turn(conversation, plan, budgets))
        await relay.send(StepStart(index, plan.kind, attempt))
        trace.is_replayed = isinstance(self.model, RecordedSession) and self.model.is_recorded
        with self.usage.request(), self.watch.turn(trace, conversation.unsent, turn):
            response = await self.model.step(conversation.unsent, turn, relay.on_model)
            trace.response, trace.model_ended = response, time.perf_counter()
        conversation.heard(response)
        self.usage.count_tokens(response.usage)
        ctx = replace(ctx, messages=tuple(conversation.messages))
        await hooks.after_model(self.hooks, ctx, response)

        ctx = replace(ctx, retry=attempt - 1)
        check = AnswerCheck(plan, ctx, attempt, self._known_refusal(index))
        parts: list[ToolPart] = []
        tools_began = time.perf_counter()
        if response.tool_calls:
            answer, parts = await self._take_calls(conversation, turn, check, budgets, relay, trace)
            tool_s = time.perf_counter() - tools_began
        else:
            answer = await check.written(response)
            tool_s = 0.0
            if answer.reason is not None:
                conversation.ask(RetryPromptPart(content=answer.reason))
        trace.metrics = response.metrics.closed(
            total_s=time.perf_counter() - trace.began, tool_s=tool_s
        )
        trace.retry_reason = answer.reason
        result: StepResult[Any] = StepResult(
            index=index,
            kind=plan.kind,
            response=response,
            tool_results=tuple(parts),
            metrics=_with_settled(trace.metrics, settled),
            attempts=attempt,
            retry_reason=answer.reason,
            value=answer.value,
            trace=trace,
            settled_trace=settled,
        )
        if self.record is not None:
            result = await self.record.step_ends(result, answer.told)
        conversation.steps.append(result)
        await relay.send(StepEnd(index, result))
        return result

    def _check_can_pause(self, plan: StepPlan) -> None:
        """Find a pause that the output type has no place for before anything is asked or run."""
        if plan.output.allow_deferred:
            return
        for tool in plan.tools:
            if self.runner.tools[tool.name].requires_approval is True:
                raise _cannot_pause(tool.name)

    def _turn(
        self, conversation: Conversation, plan: StepPlan, budgets: Sequence[Budget]
    ) -> ModelTurn:
        barred = conversation.repeats.barred(budget.repeat_call_limit(budgets))
        tools = tuple(tool for tool in plan.tools if tool.name not in barred)
        if plan.needs_call and not tools:
            tools = plan.tools  # the step's only way on stays open
        settings = _settings(conversation, plan.settings)
        limit = budget.output_tokens_left(budgets)
        if limit is not None:
            settings["max_tokens"] = min(limit, settings.get("max_tokens", limit))
        return replace(replace(plan, tools=tools).turn, settings=settings)

    async def _take_calls(
        self,
        conversation: Conversation,
        turn: ModelTurn,
        check: AnswerCheck,
        budgets: Sequence[Budget],
        relay: EventRelay,
        trace: StepTrace,
    ) -> tuple[Answer, list[ToolPart]]:
        """Run the calls, then read the answer in those of output tools. One part each, in order,
        but for those that wait for approval.

        A call of a tool beside the answer is run as any other: what a model does is never dropped.
        """
        response = trace.response
        assert response is not None
        calls = response.tool_calls
        finals = [i for i, call in enumerate(calls) if call.tool_name in turn.output_tools]
        tools = [i for i in range(len(calls)) if i not in finals]
        outcomes: dict[int, CallOutcome] = {}
        answer = Answer()
        if tools:
            run = await self._run_tools(conversation, tools, turn, check, budgets, relay, trace)
            outcomes.update(zip(tools, run, strict=True))
            waiting = [outcome for outcome in run if isinstance(outcome, AwaitsApproval)]
            answer = (
                Answer(_pause(check.plan, waiting)) if waiting else Answer(reason=_refusal(run))
            )
        if finals:
            began = time.perf_counter()
            called = [calls[i] for i in finals]
            if answer.value is UNSET:
                answer = await check.called(response, called)
            else:
                answer = replace(answer, told=too_early(called))
            for index, part in zip(finals, answer.told, strict=True):
                outcomes[index] = part
                await relay.send(ToolResult(relay.step, index, part, time.perf_counter() - began))
        ordered = [outcomes[index] for index in range(len(calls))]
        parts = [outcome for outcome in ordered if not isinstance(outcome, AwaitsApproval)]
        if parts:
            conversation.ask(*parts)
        return answer, parts

    async def _run_tools(
        self,
        conversation: Conversation,
        places: Sequence[int],
        turn: ModelTurn,
        check: AnswerCheck,
        budgets: Sequence[Budget],
        relay: EventRelay,
        trace: StepTrace,
    ) -> list[CallOutcome]:
        assert trace.response is not None
        calls = [trace.response.tool_calls[place] for place in places]
        budget.check_tool_calls(budgets, len(calls))
        self.usage.count_tool_calls(len(calls))
        notes = conversation.repeats.record(calls)

        async def on_result(index: int, part: ToolPart, seconds: float) -> None:
            noted = part.model_copy(update={"note": notes[index]})
            await relay.send(ToolResult(relay.step, places[index], noted, seconds))

        outcomes = await self.runner.run(
            calls,
            offered={tool.name: tool for tool in turn.tools},
            ctx=check.ctx,
            count=conversation.retries,
            on_result=on_result,
            ledger=None if self.record is None else self.record.calls_of(relay.step),
            watch=partial(self.watch.tool, trace),
        )
        waiting = sum(isinstance(outcome, AwaitsApproval) for outcome in outcomes)
        self.usage.count_tool_calls(-waiting)
        return [
            outcome
            if isinstance(outcome, AwaitsApproval)
            else outcome.model_copy(update={"note": note})
            for outcome, note in zip(outcomes, notes, strict=True)
        ]

    def _known_refusal(self, step: int) -> Answer | None:
        """What the journal has of an answer that was refused: it is not checked again."""
        known = None if self.record is None else self.record.refusal(step)
        return None if known is None else Answer(reason=known.retry_reason, told=known.told)


def _with_settled(metrics: StepMetrics, settled: StepTrace | None) -> StepMetrics:
    """A step's account with the calls before it that had waited for approval."""
    if settled is None or settled.metrics is None:
        return metrics
    tool_s = settled.metrics.tool_s
    return metrics.closed(total_s=metrics.total_s + tool_s, tool_s=metrics.tool_s + tool_s)


def _settings(conversation: Conversation, given: ModelSettings) -> ModelSettings:
    """The turn's own settings: another temperature and seed after a refusal, if one is given."""
    settings = merge_settings(given)
    again = settings.pop("retry_temperature", None)
    steps = conversation.steps
    if again is not None and steps and steps[-1].retry_reason is not None:
        settings["temperature"] = again
        settings["seed"] = settings.get("seed", 0) + len(steps)
    return settings


def _pause(plan: StepPlan, waiting: Sequence[AwaitsApproval]) -> DeferredToolRequests:
    """The output of a step whose calls wait for approval."""
    if not plan.output.allow_deferred:
        raise _cannot_pause(waiting[0].call.tool_name)
    return DeferredToolRequests.of(waiting)


def _cannot_pause(tool_name: str) -> UserError:
    return UserError(
        f"tool {tool_name!r} needs approval, so a run may have to pause: add DeferredToolRequests "
        "to the output type, as in output_type=str | DeferredToolRequests"
    )


def _refusal(parts: Sequence[CallOutcome]) -> str | None:
    """Why the step should be taken again: every one of its calls asked for it."""
    refusals = [part.content for part in parts if isinstance(part, RetryPromptPart)]
    return "\n".join(refusals) if len(refusals) == len(parts) else None
