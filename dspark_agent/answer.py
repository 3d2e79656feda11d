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


@dataclass(frozen=True, slots=True)
class Answer:
    """What the check came to: a value, or why it was refused."""

    value: Any | Unset = UNSET
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class AnswerCheck:
    """Checks the answers of one turn, the ``attempt``-th of its step (from 1).

    Raises:
        OutputError: from all methods, where the output was refused ``plan.retries`` times already.
        GuardrailTripped: likewise, where an output guard stops the run.
    """

    plan: StepPlan
    ctx: RunContext[Any]
    attempt: int

    async def written(self, response: ModelResponse) -> Answer:
        """The answer in what the model wrote."""
        try:
            return Answer(await self._finished(await self._read(response)))
        except ModelRetry as error:
            return self._refused(error.message, response, text=response.text)

    async def called(
        self, response: ModelResponse, finals: Sequence[ToolCallPart]
    ) -> tuple[Answer, list[ToolPart]]:
        """The answer in calls of output tools, and what the model is told about each, in order.

        The first that is accepted is the answer.
        """
        value: Any | Unset = UNSET
        reason = ""
        parts: list[ToolPart] = []
        for call in finals:
            if value is not UNSET:
                parts.append(_returned(call, SURPLUS))
                continue
            ctx = replace(self.ctx, tool_name=call.tool_name, tool_call_id=call.tool_call_id)
            try:
                value = await self.plan.output.tools[call.tool_name].value(call.args, ctx)
                value = await self._finished(value)
                parts.append(_returned(call, ACCEPTED))
            except ModelRetry as error:
                value, reason = UNSET, error.message
                parts.append(
                    RetryPromptPart(
                        content=reason, tool_name=call.tool_name, tool_call_id=call.tool_call_id
                    )
                )
        if value is not UNSET:
            return Answer(value), parts
        return self._refused(reason, response, text=finals[-1].args_json()), parts

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


def _returned(call: ToolCallPart, content: str) -> ToolReturnPart:
    return ToolReturnPart(tool_name=call.tool_name, content=content, tool_call_id=call.tool_call_id)
