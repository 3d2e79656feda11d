"""The tool calls of one step in the journal: none is run twice, none is run in doubt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dspark_agent.deferred import Approved, AwaitsApproval
from dspark_agent.errors import ToolInterruptedError
from dspark_agent.journal.entries import ToolBegun, ToolEnded
from dspark_agent.messages import RetryPromptPart, ToolCallPart, ToolReturnPart
from dspark_agent.tools import Tool

if TYPE_CHECKING:
    from dspark_agent.journal.record import RunRecord

Outcome = ToolReturnPart | RetryPromptPart | AwaitsApproval


class CallLedger:
    """What the journal knows of calls that are run together; ``index`` is a call's place."""

    def __init__(self, record: RunRecord, step: int, approved: bool) -> None:
        self._record = record
        self._step = step
        self._approved = approved

    def outcome(self, index: int) -> Outcome | None:
        """What came of a call, if it ended."""
        ended = self._record.find(ToolEnded, self._step, self._approved, index)
        return None if ended is None else ended.outcome

    async def begins(self, index: int, call: ToolCallPart) -> None:
        """Write that a call is about to be run."""
        await self._record.write(
            ToolBegun(step=self._step, approved=self._approved, index=index, call=call)
        )

    async def ends(self, index: int, call: ToolCallPart, outcome: Outcome) -> Outcome:
        """Write what came of a call; the outcome as a resumed run would read it."""
        await self._record.write(
            ToolEnded(step=self._step, approved=self._approved, index=index, outcome=outcome)
        )
        written = self.outcome(index)
        assert written is not None
        return written

    async def resumed(
        self, calls: Sequence[ToolCallPart], tools: Mapping[str, Tool[Any]]
    ) -> list[ToolCallPart]:
        """The calls as they are to be run, after a look at those that were cut off.

        One that had begun and not ended is run again where its tool is idempotent, or is dealt
        with as the run was told to (:class:`DeferredToolResults`).

        Raises:
            ToolInterruptedError: what to do about some of them is not known.
        """
        settled = list(calls)
        in_doubt: list[tuple[str, str]] = []
        for index, call in enumerate(calls):
            if self.outcome(index) is not None or not self._has_begun(index):
                continue
            verdict = self._verdict(call)
            if isinstance(verdict, ToolReturnPart):
                await self.ends(index, call, verdict)
                continue
            tool = tools.get(call.tool_name)
            if verdict is None and (tool is None or not tool.idempotent):
                in_doubt.append((call.tool_name, call.tool_call_id))
                continue
            settled[index] = call if verdict is None else verdict.call
            self._record.interrupted.append(call)
        if in_doubt:
            raise ToolInterruptedError(f"{self._record.where}, step {self._step}", in_doubt)
        return settled

    def _verdict(self, call: ToolCallPart) -> Approved | ToolReturnPart | None:
        """What was decided about a call that was cut off; None for nothing. The approval that
        let it begin is no permission to begin it twice."""
        if call.tool_call_id not in self._record.given:
            return None
        verdict = self._record.given.verdict(call)
        return None if isinstance(verdict, Approved) and not verdict.again else verdict

    def _has_begun(self, index: int) -> bool:
        return self._record.find(ToolBegun, self._step, self._approved, index) is not None
