"""A run: steps with all of an agent's tools until one of them gives the output."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic

from typing_extensions import TypeVar

from dspark_agent.context import DepsT
from dspark_agent.core import Core, Work
from dspark_agent.errors import UserError
from dspark_agent.history import History
from dspark_agent.limits import RunUsage, UsageLimits
from dspark_agent.messages import ModelRequest, ModelResponse
from dspark_agent.settings import ModelSettings
from dspark_agent.step import UNSET, StepResult, Unset
from dspark_agent.timeline import Timeline, timeline_of

OutT_co = TypeVar("OutT_co", default=str, covariant=True)


@dataclass(frozen=True, slots=True)
class RunResult(Generic[OutT_co]):
    """What a run came to.

    ``usage`` is what it used; ``steps`` its model turns, each with its metrics; ``history`` the
    whole conversation, to go on from.
    """

    output: OutT_co
    usage: RunUsage
    steps: tuple[StepResult[Any], ...]
    history: History
    new_from: int

    def all_messages(self) -> list[ModelRequest | ModelResponse]:
        """The whole conversation, the history that the run started from included."""
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
        traces = [step.trace for step in self.steps if step.trace is not None]
        return timeline_of(traces, content=content)


class AgentRun(Generic[DepsT, OutT_co]):
    """A run that its caller drives: ``async for step in run`` takes one model turn each time.

    :meth:`step` takes the next turn with a narrower choice. ``result`` is there at the end.
    """

    def __init__(
        self, core: Core[DepsT], work: Work, prompt: str | None, output_type: Any = UNSET
    ) -> None:
        self._core = core
        self._work = work
        self._prompt = prompt
        self._output_type = output_type
        self._asked = False
        self._attempt = 1
        self._output: OutT_co | Unset = UNSET
        self._first_step = len(core.conversation.steps)
        self._first_message = len(core.conversation.messages)
        self._start_usage = core.usage.model_copy()

    @property
    def is_done(self) -> bool:
        """Whether a step gave the output."""
        return self._output is not UNSET

    @property
    def steps(self) -> tuple[StepResult[Any], ...]:
        """The run's model turns so far."""
        return tuple(self._core.conversation.steps[self._first_step :])

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
            new_from=self._first_message,
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
        core = self._core
        own = self._output_type is UNSET
        plan = core.plan(
            output_type=self._output_type,
            tools=tuple(core.runner.tools) if tools is None and not own else tools,
            tool_choice=tool_choice,
            args=args,
            settings=settings,
        )
        with core.work(limits, self._work) as work:
            async with core.whole_or_not_at_all():
                if not self._asked:
                    await core.ask(self._prompt, work)
                result = await core.take(plan, work, self._attempt)
        self._asked = True
        refused = result.retry_reason is not None and not result.tool_calls
        self._attempt = self._attempt + 1 if refused else 1
        self._output = result.value
        return result
