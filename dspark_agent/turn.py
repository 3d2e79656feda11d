"""One model turn and the execution of the tool calls it made."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic

import anyio

from dspark_agent import budget, hooks
from dspark_agent.answer import Answer, AnswerCheck, too_early
from dspark_agent.budget import Budget
from dspark_agent.context import DepsT, RunContext
from dspark_agent.conversation import Conversation
from dspark_agent.deferred import AwaitsApproval, DeferredToolRequests
from dspark_agent.early_calls import EarlyCalls, early_calls
from dspark_agent.errors import UserError
from dspark_agent.events import StepEnd, StepStart, ToolResult
from dspark_agent.execution import CallOutcome, ToolPart, ToolRunner
from dspark_agent.hooks import Hooks
from dspark_agent.journal.record import RunRecord
from dspark_agent.journal.session import RecordedSession
from dspark_agent.limits import RunUsage
from dspark_agent.messages import ModelResponse, RetryPromptPart, ToolCallPart
from dspark_agent.metrics import StepMetrics
from dspark_agent.models.base import ModelEvent, ModelSession, ModelTurn
from dspark_agent.observer import Watch
from dspark_agent.relay import EventHandler, EventRelay
from dspark_agent.settings import ModelSettings, merge_settings
from dspark_agent.step import UNSET, StepPlan, StepResult
from dspark_agent.trace import StepTrace
from dspark_agent.urgency import standing, waited_for


@dataclass(frozen=True, slots=True)
class _Calls:
    """The calls of one turn, and what they are run with; ``finals`` are the places of those whose
    arguments are the answer."""

    made: Sequence[ToolCallPart]
    turn: ModelTurn
    budgets: Sequence[Budget]
    relay: EventRelay
    trace: StepTrace
    early: EarlyCalls

    @property
    def finals(self) -> list[int]:
        return [i for i, call in enumerate(self.made) if call.tool_name in self.turn.output_tools]


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
        tool_s = 0.0
        with waited_for(standing(turn.urgency, _seconds(turn.deadline_s))):
            async with self._early_calls(conversation, turn, ctx, budgets, trace) as early:
                response = await self._written(conversation, turn, relay, trace, early)
                ctx = replace(ctx, messages=tuple(conversation.messages), retry=attempt - 1)
                await hooks.after_model(self.hooks, ctx, response)
                check = AnswerCheck(plan, ctx, attempt, self._known_refusal(index))
                parts: list[ToolPart] = []
                if response.tool_calls:
                    tools_began = time.perf_counter()
                    calls = _Calls(response.tool_calls, turn, budgets, relay, trace, early)
                    answer, parts = await self._take_calls(conversation, calls, check, response)
                    tool_s = time.perf_counter() - tools_began
                else:
                    answer = await check.written(response)
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
        wanted = standing(settings.get("urgency"), budget.deadline(budgets) - anyio.current_time())
        return replace(
            replace(plan, tools=tools).turn,
            settings=settings,
            urgency=wanted.urgency,
            deadline_s=wanted.deadline_s,
        )

    def _early_calls(
        self,
        conversation: Conversation,
        turn: ModelTurn,
        ctx: RunContext[DepsT],
        budgets: Sequence[Budget],
        trace: StepTrace,
    ) -> AbstractAsyncContextManager[EarlyCalls]:
        """Calls start while the turn is written, but for those of a run that is recorded, which the
        journal sees first, and those whose number is limited: they start when it is known that all
        of them may."""
        return early_calls(
            self.runner,
            offered={tool.name: tool for tool in turn.tools},
            ctx=replace(ctx, messages=tuple(conversation.messages)),
            count=conversation.retries,
            watch=partial(self.watch.tool, trace),
            allowed=self.record is None and not budget.limits_tool_calls(budgets),
        )

    async def _written(
        self,
        conversation: Conversation,
        turn: ModelTurn,
        relay: EventRelay,
        trace: StepTrace,
        early: EarlyCalls,
    ) -> ModelResponse:
        """What the model writes; it counts as said."""

        async def on_model(event: ModelEvent) -> None:
            early.hear(event)
            await relay.on_model(event)

        trace.is_replayed = isinstance(self.model, RecordedSession) and self.model.is_recorded
        with self.usage.request(), self.watch.turn(trace, conversation.unsent, turn):
            response = await self.model.step(conversation.unsent, turn, on_model)
            trace.response, trace.model_ended = response, time.perf_counter()
        early.written()
        conversation.heard(response)
        self.usage.count_tokens(response.usage)
        return response

    async def _take_calls(
        self,
        conversation: Conversation,
        calls: _Calls,
        check: AnswerCheck,
        response: ModelResponse,
    ) -> tuple[Answer, list[ToolPart]]:
        """Run the calls, then read the answer in those of output tools. One part each, in order,
        but for those that wait for approval.

        A call of a tool beside the answer is run as any other: what a model does is never dropped.
        """
        made, finals = calls.made, calls.finals
        outcomes: dict[int, CallOutcome] = {}
        answer = Answer()
        if len(finals) < len(made):
            outcomes = await self._run_tools(conversation, calls, check)
            waiting = [each for each in outcomes.values() if isinstance(each, AwaitsApproval)]
            if waiting:
                answer = Answer(_pause(check.plan, waiting))
            else:
                answer = Answer(reason=_refusal(list(outcomes.values())))
        if finals:
            began = time.perf_counter()
            called = [made[i] for i in finals]
            if answer.value is UNSET:
                answer = await check.called(response, called)
            else:
                answer = replace(answer, told=too_early(called))
            for index, part in zip(finals, answer.told, strict=True):
                outcomes[index] = part
                seconds = time.perf_counter() - began
                await calls.relay.send(ToolResult(calls.relay.step, index, part, seconds))
        ordered = [outcomes[index] for index in range(len(made))]
        parts = [outcome for outcome in ordered if not isinstance(outcome, AwaitsApproval)]
        if parts:
            conversation.ask(*parts)
        return answer, parts

    async def _run_tools(
        self, conversation: Conversation, calls: _Calls, check: AnswerCheck
    ) -> dict[int, CallOutcome]:
        """The outcomes of the calls that are not the answer, by their places."""
        places = [i for i in range(len(calls.made)) if i not in calls.finals]
        run = [calls.made[place] for place in places]
        budget.check_tool_calls(calls.budgets, len(run))
        self.usage.count_tool_calls(len(run))
        notes = conversation.repeats.record(run)
        likely = self._turn(conversation, check.plan, calls.budgets)
        relay, early = calls.relay, calls.early

        async def on_result(index: int, part: ToolPart, seconds: float) -> None:
            noted = part.model_copy(update={"note": notes[index]})
            await relay.send(ToolResult(relay.step, places[index], noted, seconds))

        with early.beside(partial(self.model.anticipate, calls.made, likely)):
            outcomes = await self.runner.run(
                run,
                offered={tool.name: tool for tool in calls.turn.tools},
                ctx=check.ctx,
                count=conversation.retries,
                on_result=on_result,
                ledger=None if self.record is None else self.record.calls_of(relay.step),
                watch=partial(self.watch.tool, calls.trace),
                early=lambda index, call: early.result(places[index], call),
            )
        waiting = sum(isinstance(outcome, AwaitsApproval) for outcome in outcomes)
        self.usage.count_tool_calls(-waiting)
        return {
            place: outcome
            if isinstance(outcome, AwaitsApproval)
            else outcome.model_copy(update={"note": note})
            for place, outcome, note in zip(places, outcomes, notes, strict=True)
        }

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


def _seconds(deadline_s: float | None) -> float:
    return math.inf if deadline_s is None else deadline_s


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
