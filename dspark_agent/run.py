"""A run: steps with all of an agent's tools until one of them gives the output."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic

from typing_extensions import TypeVar

from dspark_agent.account import Work
from dspark_agent.asking import ask
from dspark_agent.branching import take_over
from dspark_agent.context import DepsT
from dspark_agent.core import Core
from dspark_agent.deferred import DeferredToolRequests, DeferredToolResults
from dspark_agent.delegation import Handoff
from dspark_agent.errors import UserError
from dspark_agent.events import ContextCompacted
from dspark_agent.history import History
from dspark_agent.limits import RunUsage, UsageLimits
from dspark_agent.messages import (
    ModelRequest,
    ModelResponse,
    RequestPart,
    ToolCallPart,
    ToolReturnPart,
    open_calls,
)
from dspark_agent.settings import ModelSettings
from dspark_agent.step import UNSET, StepPlan, StepResult, Unset
from dspark_agent.timeline import Timeline, timeline_of
from dspark_agent.trace import StepTrace

OutT_co = TypeVar("OutT_co", default=str, covariant=True)


@dataclass(frozen=True, slots=True)
class RunResult(Generic[OutT_co]):
    """What a run came to.

    ``usage`` is what it used; ``steps`` its model turns, each with its metrics; ``history`` the
    whole conversation, to go on from. ``compactions`` say when it was shortened to fit the model's
    context, and hold what was left out. ``interrupted`` are calls that an earlier process had begun
    and not ended, and that were run again. ``agent_name`` says whose output it is: the agent's, or
    that of the one it was handed over to last.
    """

    output: OutT_co
    usage: RunUsage
    steps: tuple[StepResult[Any], ...]
    history: History
    new_from: int
    compactions: tuple[ContextCompacted, ...] = ()
    interrupted: tuple[ToolCallPart, ...] = ()
    agent_name: str = ""

    def all_messages(self) -> list[ModelRequest | ModelResponse]:
        """The whole conversation, the history that the run started from included; where it was
        shortened, as the model sees it now (see ``compactions``)."""
        return list(self.history.messages)

    def new_messages(self) -> list[ModelRequest | ModelResponse]:
        """The messages of this run."""
        return list(self.history.messages[self.new_from :])

    def timeline(self, *, content: bool = False) -> Timeline:
        """When each step did what, with the steps of other agents inside its tools.

        ``content``: include what was said, called and returned; else only names, counts and
        times. :class:`~dspark_agent.Recording` covers several runs, and those that fail.

        Raises:
            UserError: no step of the run was taken in this process.
        """
        traces = [trace for step in self.steps for trace in (step.settled_trace, step.trace)]
        return timeline_of([trace for trace in traces if trace is not None], content=content)


class AgentRun(Generic[DepsT, OutT_co]):
    """A run that its caller drives: ``async for step in run`` takes one model turn each time.

    :meth:`step` takes the next turn with a narrower choice. ``result`` is there at the end.
    """

    def __init__(
        self,
        core: Core[DepsT],
        work: Work,
        prompt: str | None,
        output_type: Any = UNSET,
        results: DeferredToolResults | None = None,
        successor: Callable[[Handoff[DepsT]], Core[Any]] | None = None,
    ) -> None:
        self._core = core
        self._successor = successor
        self._work = work
        self._prompt = prompt
        self._output_type = output_type
        self._results = results
        self._asked = False
        self._attempt = 1
        self._output: OutT_co | Unset = UNSET
        self._first_step = len(core.conversation.steps)
        self._first_compaction = len(core.conversation.compactions)
        core.conversation.run_begin = len(core.conversation.messages)
        self._start_usage = core.usage.model_copy()

    @property
    def is_done(self) -> bool:
        """Whether a step gave the output."""
        return self._output is not UNSET

    @property
    def core(self) -> Core[DepsT]:
        """The conversation of the agent that is at work now."""
        return self._core

    @property
    def steps(self) -> tuple[StepResult[Any], ...]:
        """The run's model turns so far."""
        return tuple(self._core.conversation.steps[self._first_step :])

    @property
    def history(self) -> History:
        """The conversation so far; a step that failed is no part of it."""
        return self._core.history()

    @property
    def result(self) -> RunResult[OutT_co]:
        """What the run came to.

        Raises:
            UserError: it is not done.
        """
        if isinstance(self._output, Unset):
            raise UserError("the run has no result yet: iterate it to its end")
        core = self._core
        return RunResult(
            output=self._output,
            usage=core.usage.since(self._start_usage),
            steps=self.steps,
            history=core.history(),
            new_from=core.conversation.run_begin,
            compactions=tuple(core.conversation.compactions[self._first_compaction :]),
            interrupted=() if core.record is None else tuple(core.record.interrupted),
            agent_name=core.declaration.name,
        )

    def __aiter__(self) -> AsyncIterator[StepResult[OutT_co]]:
        return self

    async def __anext__(self) -> StepResult[OutT_co]:
        if self.is_done:
            raise StopAsyncIteration
        return await self.step()

    async def step(
        self,
        *,
        tools: Sequence[str] | None = None,
        tool_choice: str | None = None,
        args: Mapping[str, Any] | None = None,
        settings: ModelSettings | None = None,
        limits: UsageLimits | None = None,
    ) -> StepResult[OutT_co]:
        """The next model turn, with a choice of tools (see :meth:`Session.step`), settings and
        limits of its own.

        A refused turn comes back with its ``retry_reason``; the next one tries again.

        Raises:
            UserError: the run is done.
            DSparkError: as :meth:`Session.step`. The failing turn is undone.
        """
        if self.is_done:
            raise UserError("the run is done; read its result")

        def planned() -> StepPlan:
            core, own = self._core, self._output_type is UNSET
            return core.plan(
                output_type=self._output_type,
                tools=tuple(core.runner.tools) if tools is None and not own else tools,
                tool_choice=tool_choice,
                args=args,
                settings=settings,
            )

        plan = planned()
        with self._core.work(limits, self._work) as work:
            before = self._core
            settled = await self._settle(work)
            core = self._core
            if core is not before:
                plan = planned()

            async def turns() -> StepResult[Any]:
                if not self._asked:
                    await ask(core, self._prompt, work)
                return await core.take(plan, work, self._attempt, settled)

            result = await core.committed(work, turns)
        self._asked = True
        finals = any(call.tool_name in plan.turn.output_tools for call in result.tool_calls)
        refused = result.retry_reason is not None and (finals or not result.tool_calls)
        self._attempt = self._attempt + 1 if refused else 1
        if not result.is_final:
            await self._hand_over(result.tool_calls, result.tool_results)
            return result
        if self._decisions() is None:  # else the next step carries them out
            self._output = result.value
            await self._end()
        return result

    async def _settle(self, work: Work) -> StepTrace | None:
        """Carry out what was decided about calls that wait."""
        results = self._decisions()
        if results is None:
            return None
        settled = await self._core.settle(results, work)
        self._results = None
        response, request = self._core.conversation.messages[-2:]
        assert isinstance(response, ModelResponse)
        assert isinstance(request, ModelRequest)
        await self._hand_over(response.tool_calls, request.parts)
        return settled

    def _decisions(self) -> DeferredToolResults | None:
        """Decisions that wait to be carried out: the caller's, or the journal's."""
        core = self._core
        if core.record is None:
            return self._results
        waiting = open_calls(core.conversation.messages)
        return core.record.decisions(len(core.conversation.steps) - 1, waiting) if waiting else None

    async def _end(self) -> None:
        record = self._core.record
        if record is not None and not isinstance(self._output, DeferredToolRequests):
            await record.end()

    async def _hand_over(
        self, calls: Sequence[ToolCallPart], results: Sequence[RequestPart]
    ) -> None:
        """Go on with the agent of the first handoff that was called and went through, if any."""
        before = self._core
        handoff = _handoff(before, calls, results)
        if handoff is None:
            return
        if self._successor is None:
            raise UserError(
                f"{handoff.name}: a session stays with its agent; hand over in Agent.run instead"
            )
        after = self._successor(handoff)
        try:
            await take_over(after, before, self._work, self._output_type)
        except BaseException:
            await after.close()
            raise
        self._core = after
        await before.close()


def _handoff(
    core: Core[DepsT], calls: Sequence[ToolCallPart], results: Sequence[RequestPart]
) -> Handoff[DepsT] | None:
    done = {
        part.tool_call_id
        for part in results
        if isinstance(part, ToolReturnPart) and part.outcome == "success"
    }
    for call in calls:
        tool = core.runner.tools.get(call.tool_name)
        if isinstance(tool, Handoff) and call.tool_call_id in done:
            return tool
    return None
