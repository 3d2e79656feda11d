"""Carrying out what was decided about calls that waited for approval."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from pydantic import ValidationError

from dspark_agent import budget
from dspark_agent.budget import Budget
from dspark_agent.context import RunContext
from dspark_agent.conversation import Conversation
from dspark_agent.deferred import Approved, AwaitsApproval, DeferredToolResults, check_decisions
from dspark_agent.errors import UserError
from dspark_agent.events import ToolResult
from dspark_agent.execution import ToolPart, ToolRunner
from dspark_agent.function_schema import validation_text
from dspark_agent.messages import open_calls
from dspark_agent.metrics import StepMetrics
from dspark_agent.output import Output
from dspark_agent.relay import EventRelay
from dspark_agent.trace import StepTrace
from dspark_agent.turn import TurnTaker


async def settle(
    taker: TurnTaker[Any],
    conversation: Conversation,
    results: DeferredToolResults,
    *,
    ctx: RunContext[Any],
    budgets: Sequence[Budget],
    trace: StepTrace,
) -> None:
    """Run the approved calls and add the results of all that waited.

    The results' events, and ``trace``, carry the number of the step that comes next.

    Raises:
        UserError: ``results`` does not decide exactly the calls that wait, or the arguments that
            were approved do not fit the tool. Nothing was run.
        UsageLimitExceeded: more calls were approved than may still be run. Nothing was run.
    """
    waiting = open_calls(conversation.messages)
    check_decisions(waiting, results)
    verdicts = [results.verdict(call) for call in waiting]
    approved = {place: v for place, v in enumerate(verdicts) if isinstance(v, Approved)}
    for verdict in approved.values():
        _check_arguments(taker.runner, verdict)
    budget.check_tool_calls(budgets, len(approved))
    taker.usage.count_tool_calls(len(approved))
    step, places = len(conversation.steps), list(approved)
    if taker.record is not None:
        await taker.record.decide(step - 1, results)
    relay = EventRelay(taker.handler, step, Output(str), trace)

    async def on_result(index: int, part: ToolPart, seconds: float) -> None:
        noted = part.model_copy(update={"note": approved[places[index]].note})
        await relay.send(ToolResult(step, places[index], noted, seconds))

    outcomes = await taker.runner.run(
        [verdict.call for verdict in approved.values()],
        offered={name: tool.definition for name, tool in taker.runner.tools.items()},
        ctx=replace(ctx, tool_call_approved=True),
        count=conversation.retries,
        on_result=on_result,
        ledger=None if taker.record is None else taker.record.calls_of(step - 1, approved=True),
        watch=partial(taker.watch.tool, trace),
    )
    parts: list[ToolPart] = []
    for place, given in enumerate(verdicts):
        if not isinstance(given, Approved):
            parts.append(given)
            await relay.send(ToolResult(step, place, given, 0.0))
    for place, outcome in zip(places, outcomes, strict=True):
        assert not isinstance(outcome, AwaitsApproval)
        parts.append(outcome.model_copy(update={"note": approved[place].note}))
    conversation.answer(parts)
    seconds = time.perf_counter() - trace.began
    trace.metrics = StepMetrics().closed(total_s=seconds, tool_s=seconds)


def _check_arguments(runner: ToolRunner[Any], approved: Approved) -> None:
    call = approved.call
    tool = runner.tools.get(call.tool_name)
    if tool is None:
        there_are = ", ".join(runner.tools) or "none"
        raise UserError(
            f"call {call.tool_call_id} was approved, and the agent has no tool {call.tool_name!r} "
            f"(any more); it has: {there_are}"
        )
    try:
        tool.schema.validate(call.args)
    except ValidationError as error:
        raise UserError(
            f"call {call.tool_call_id} was approved with arguments that do not fit "
            f"{call.tool_name}:\n{validation_text(error)}"
        ) from error
