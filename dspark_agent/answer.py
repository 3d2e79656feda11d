"""Whether a model turn gave the answer: its text or its output tools' calls, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dspark_agent.calling import call_with_ctx
from dspark_agent.context import RunContext
from dspark_agent.errors import ModelRetry, OutputError
from dspark_agent.execution import ToolPart
from dspark_agent.guards import check_guards
from dspark_agent.messages import (
    FinishReason,
    ModelResponse,
    RetryPromptPart,
    ToolCallPart,
    ToolReturnPart,
)
from dspark_agent.step import UNSET, StepPlan, Unset

ACCEPTED = "The answer was accepted."
SURPLUS = "Not used: another call of this turn gave the answer."
TOO_EARLY = (
    "Not used: other calls of this turn wait for approval; answer when you know their results."
)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the check came to: a value, or why it was refused.

    ``told`` is what the model reads about each call of an output tool, in their order.
    """

    value: Any | Unset = UNSET
    reason: str | None = None
    told: tuple[ToolPart, ...] = ()


@dataclass(frozen=True, slots=True)
class AnswerCheck:
    """Checks the answers of one turn, the ``attempt``-th of its step (from 1).

    ``known`` is the answer that was refused before, where a run goes on from its journal.

    Raises:
        OutputError: from all methods, where the output was refused ``plan.retries`` times already.
        GuardrailTripped: likewise, where an output guard stops the run.
    """

    plan: StepPlan
    ctx: RunContext[Any]
    attempt: int
    known: Answer | None = None

    async def written(self, response: ModelResponse) -> Answer:
        """The answer in what the model wrote."""
        if self.known is not None:
            return self.known
        try:
            return Answer(await self._finished(await self._read(response)))
        except ModelRetry as error:
            return self._refused(error.message, response, text=response.text)

    async def called(self, response: ModelResponse, finals: Sequence[ToolCallPart]) -> Answer:
        """The answer in calls of output tools: the first that is accepted."""
        if self.known is not None:
            return self.known
        value: Any | Unset = UNSET
        reason = ""
        told: list[ToolPart] = []
        for call in finals:
            if value is not UNSET:
                told.append(_returned(call, SURPLUS))
                continue
            ctx = replace(self.ctx, tool_name=call.tool_name, tool_call_id=call.tool_call_id)
            try:
                value = await self.plan.output.tools[call.tool_name].value(call.args, ctx)
                value = await self._finished(value)
                told.append(_returned(call, ACCEPTED))
            except ModelRetry as error:
                value, reason = UNSET, error.message
                told.append(
                    RetryPromptPart(
                        content=reason, tool_name=call.tool_name, tool_call_id=call.tool_call_id
                    )
                )
        if value is not UNSET:
            return Answer(value, told=tuple(told))
        refused = self._refused(reason, response, text=finals[-1].args_json())
        return replace(refused, told=tuple(told))

    async def _read(self, response: ModelResponse) -> Any:
        if self.plan.needs_call:
            raise ModelRetry("This step needs a tool call, not an answer.")
        if not response.text.strip():
            raise ModelRetry("The answer was empty.")
        if not self.plan.output.answers_in_writing:
            names = " or ".join(self.plan.output.tools)
            raise ModelRetry(f"Give the answer by calling {names}.")
        return await self.plan.output.read(response.text, self.ctx)

    async def _finished(self, output: Any) -> Any:
        for validator in self.plan.validators:
            output = await call_with_ctx(validator, self.ctx, output)
        await check_guards(self.plan.guards, self.ctx, output, place="output")
        return output

    def _refused(self, reason: str, response: ModelResponse, *, text: str) -> Answer:
        if response.finish_reason is FinishReason.LENGTH:
            reason = f"The answer was cut off at the token limit; be shorter. {reason}"
        if self.attempt > self.plan.retries:
            raise OutputError(reason, text=text, attempts=self.attempt)
        return Answer(reason=reason)


def too_early(finals: Sequence[ToolCallPart]) -> tuple[ToolPart, ...]:
    """What the model reads about an answer that it gave while other calls wait for approval."""
    return tuple(_returned(call, TOO_EARLY) for call in finals)


def _returned(call: ToolCallPart, content: str) -> ToolReturnPart:
    return ToolReturnPart(tool_name=call.tool_name, content=content, tool_call_id=call.tool_call_id)
