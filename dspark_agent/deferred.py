"""Calls that wait for somebody's decision: what a paused run asks, and what it is answered.

A run whose tool needs approval ends with :class:`DeferredToolRequests` as its output; a run that is
given :class:`DeferredToolResults` goes on from there. Both are JSON on the way between processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool

from dspark_agent.errors import UnexpectedModelBehavior, UserError
from dspark_agent.messages import ToolCallPart, ToolReturnPart


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AwaitsApproval(_Value):
    """One call that was not run: somebody has to approve it first."""

    call: ToolCallPart
    metadata: dict[str, Any] = Field(default_factory=dict)
    part_kind: Literal["awaits-approval"] = "awaits-approval"


class DeferredToolRequests(_Value):
    """The output of a run that pauses: the calls that wait for approval.

    An agent whose tools may need approval names it in its output type, as in
    ``output_type=str | DeferredToolRequests``. ``metadata`` is, by ``tool_call_id``, what the tool
    said with :class:`~dspark_agent.ApprovalRequired`.
    """

    approvals: tuple[ToolCallPart, ...] = ()
    metadata: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @classmethod
    def of(cls, waiting: Sequence[AwaitsApproval]) -> DeferredToolRequests:
        """The request for all of ``waiting``.

        Raises:
            UnexpectedModelBehavior: two of the calls have the same id.
        """
        calls = tuple(each.call for each in waiting)
        if len({call.tool_call_id for call in calls}) < len(calls):
            ids = ", ".join(call.tool_call_id for call in calls)
            raise UnexpectedModelBehavior(
                f"calls that wait for approval share an id, so that no decision could be told "
                f"from the other: {ids}"
            )
        return cls(
            approvals=calls,
            metadata={each.call.tool_call_id: each.metadata for each in waiting if each.metadata},
        )


class ToolApproved(_Value):
    """Run the call; with ``override_args`` in place of the model's arguments, if given.

    ``again``: even though it had begun before the run was cut off, and may have taken effect.
    """

    override_args: dict[str, Any] | None = None
    again: bool = False
    kind: Literal["tool-approved"] = "tool-approved"


class ToolDenied(_Value):
    """Do not run the call; the model reads ``message``."""

    message: str = "The tool call was denied."
    kind: Literal["tool-denied"] = "tool-denied"


class DeferredToolResults(_Value):
    """The decisions, by ``tool_call_id``: what a paused run is resumed with.

    ``approvals``: True or :class:`ToolApproved` runs the call, False or :class:`ToolDenied` tells
    the model that it was not run. ``calls``: results found elsewhere, instead of running the call.
    """

    calls: dict[str, Any] = Field(default_factory=dict)
    approvals: dict[str, StrictBool | ToolApproved | ToolDenied] = Field(default_factory=dict)

    def __contains__(self, tool_call_id: str) -> bool:
        return tool_call_id in self.approvals or tool_call_id in self.calls

    def about(self, calls: Sequence[ToolCallPart]) -> DeferredToolResults | None:
        """The decisions about ``calls`` alone; None where there is not one."""
        ids = {call.tool_call_id for call in calls}
        found = DeferredToolResults(
            calls={key: value for key, value in self.calls.items() if key in ids},
            approvals={key: value for key, value in self.approvals.items() if key in ids},
        )
        return found if found.calls or found.approvals else None

    def verdict(self, call: ToolCallPart) -> Approved | ToolReturnPart:
        """What is to be done about ``call``: run it, or give the model this result."""
        call_id = call.tool_call_id
        if call_id in self.calls:
            return ToolReturnPart(
                tool_name=call.tool_name, content=self.calls[call_id], tool_call_id=call_id
            )
        decision = self.approvals[call_id]
        if decision is True:
            return Approved(call)
        if isinstance(decision, ToolApproved):
            if decision.override_args is None:
                return Approved(call, again=decision.again)
            edited = call.model_copy(update={"args": dict(decision.override_args)})
            return Approved(edited, _edited_note(edited), decision.again)
        denied = decision if isinstance(decision, ToolDenied) else ToolDenied()
        return ToolReturnPart(
            tool_name=call.tool_name,
            content=denied.message,
            tool_call_id=call_id,
            outcome="denied",
        )


@dataclass(frozen=True, slots=True)
class Approved:
    """A call to run, with the arguments that were approved; ``note`` is for the model, ``again``
    as in :class:`ToolApproved`."""

    call: ToolCallPart
    note: str | None = None
    again: bool = False


def check_decisions(waiting: Sequence[ToolCallPart], results: DeferredToolResults) -> None:
    """Raise :class:`UserError` unless ``results`` decides each call of ``waiting``, and no other,
    once."""
    ids = {call.tool_call_id for call in waiting}
    there_are = ", ".join(f"{call.tool_call_id} ({call.tool_name})" for call in waiting) or "none"
    both = results.calls.keys() & results.approvals.keys()
    if both:
        raise UserError(
            f"DeferredToolResults: {min(both)} is in calls and in approvals; decide it once"
        )
    for call_id in (*results.calls, *results.approvals):
        if call_id not in ids:
            raise UserError(
                f"DeferredToolResults: no call {call_id} waits for a decision; waiting: {there_are}"
            )
    for call in waiting:
        if call.tool_call_id not in results:
            raise UserError(
                f"DeferredToolResults: no decision about {call.tool_call_id} ({call.tool_name}); "
                f"waiting: {there_are}"
            )


def _edited_note(call: ToolCallPart) -> str:
    return f"Note: the call was approved with other arguments: {call.args_json()}"
