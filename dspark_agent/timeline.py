"""A run on one time axis: a value that is written as JSON and drawn by ``dspark-agent trace``."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from dspark_agent.deferred import AwaitsApproval
from dspark_agent.errors import UserError
from dspark_agent.limits import RequestUsage
from dspark_agent.messages import FinishReason, RetryPromptPart
from dspark_agent.metrics import StepMetrics
from dspark_agent.step import StepKind
from dspark_agent.trace import StepTrace, ToolTrace

ToolOutcome = Literal["success", "failed", "denied", "retry", "waiting", "unfinished"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class TimelineTokens(_Part):
    """Tokens in a row from one source, and when they were committed; ``text`` only with content."""

    source: str
    tokens: int
    begin_s: float
    end_s: float
    text: str | None = None


class TimelineTool(_Part):
    """One tool call; ``arguments`` (JSON) and ``result`` only with content. ``waiting``: for
    approval; ``unfinished``: it raised or was cancelled."""

    name: str
    begin_s: float
    end_s: float
    outcome: ToolOutcome
    arguments: str | None = None
    result: str | None = None


class TimelineStep(_Part):
    """One model turn and its tools.

    ``parent`` is the place in the timeline of the step in whose tool it was taken. A step that
    failed has ``error``, and ``metrics`` without a sum where the model never answered.
    """

    agent: str
    model: str
    conversation: str
    index: int
    kind: StepKind
    attempt: int
    parent: int | None
    begin_s: float
    model_end_s: float | None
    end_s: float
    metrics: StepMetrics
    usage: RequestUsage
    finish_reason: FinishReason | None = None
    is_refused: bool = False
    retry_reason: str | None = None
    error: str | None = None
    text: str | None = None
    tokens: tuple[TimelineTokens, ...] = ()
    tools: tuple[TimelineTool, ...] = ()


class Timeline(_Part):
    """Steps of one or more agents, in the order in which they began. All ``*_s`` are seconds
    since ``started_at``, when the first of them did."""

    version: Literal[1] = 1
    started_at: datetime
    steps: tuple[TimelineStep, ...]

    @property
    def total_s(self) -> float:
        """From the begin of the first step to the end of the last."""
        return max(step.end_s for step in self.steps)

    @property
    def lanes(self) -> tuple[tuple[str, str], ...]:
        """Each agent's conversations, as (agent, conversation), in the order of their begin."""
        return tuple(dict.fromkeys((step.agent, step.conversation) for step in self.steps))

    def write(self, path: str | Path) -> None:
        """Write it as JSON, for :meth:`read` and ``dspark-agent trace``."""
        Path(path).write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> Timeline:
        """What :meth:`write` wrote.

        Raises:
            UserError: the file holds something else; the message says where.
            OSError: it cannot be read.
        """
        try:
            timeline = cls.model_validate_json(Path(path).read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the file"
            raise UserError(
                f"{path} is not a recorded run: {place}: {first['msg']}; record one with "
                "`dspark-agent run --trace FILE` or Timeline.write"
            ) from error
        if not timeline.steps:
            raise UserError(f"{path}: the recorded run has no steps")
        return timeline

    def html(self) -> str:
        """One self-contained page that draws it."""
        from dspark_agent.viewer import page

        return page(self)


def timeline_of(traces: Sequence[StepTrace], *, content: bool) -> Timeline:
    """The traces, and those nested in them, on one axis.

    Raises:
        UserError: there are none.
    """
    if not traces:
        raise UserError("no step was taken, so there is no timeline")
    nested = [found for trace in traces for found in _flat(trace, None)]
    nested.sort(key=lambda found: found[0].began)
    places = {id(trace): place for place, (trace, _) in enumerate(nested)}
    origin = nested[0][0].began
    steps = tuple(
        _step(trace, None if parent is None else places[id(parent)], origin, content)
        for trace, parent in nested
    )
    ago = timedelta(seconds=time.perf_counter() - origin)
    return Timeline(started_at=datetime.now(tz=UTC) - ago, steps=steps)


def _flat(
    trace: StepTrace, parent: StepTrace | None
) -> Iterator[tuple[StepTrace, StepTrace | None]]:
    yield trace, parent
    for child in trace.nested:
        yield from _flat(child, trace)


def _step(trace: StepTrace, parent: int | None, origin: float, content: bool) -> TimelineStep:
    ended = time.perf_counter() if trace.ended is None else trace.ended
    response = trace.response
    metrics = trace.metrics
    if metrics is None:
        metrics = StepMetrics() if response is None else response.metrics
    return TimelineStep(
        agent=trace.agent,
        model=trace.model,
        conversation=trace.conversation_id,
        index=trace.index,
        kind=trace.kind,
        attempt=trace.attempt,
        parent=parent,
        begin_s=trace.began - origin,
        model_end_s=None if trace.model_ended is None else trace.model_ended - origin,
        end_s=ended - origin,
        metrics=metrics,
        usage=RequestUsage() if response is None else response.usage,
        finish_reason=None if response is None else response.finish_reason,
        is_refused=trace.retry_reason is not None,
        retry_reason=trace.retry_reason if content else None,
        error=trace.error,
        text=response.text if content and response is not None else None,
        tokens=tuple(_tokens(trace, origin, content)),
        tools=tuple(_tool(tool, ended, origin, content) for tool in trace.tools),
    )


def _tokens(trace: StepTrace, origin: float, content: bool) -> Iterator[TimelineTokens]:
    metrics = StepMetrics() if trace.response is None else trace.response.metrics
    prefilled = trace.began + metrics.queue_s + metrics.prefill_s
    begin = trace.began
    for run in trace.token_runs:
        # Nothing is chosen before the prompt is read, but for what the grammar forces.
        begin = max(begin, min(prefilled, run.ended))
        yield TimelineTokens(
            source=run.source,
            tokens=run.tokens,
            begin_s=begin - origin,
            end_s=run.ended - origin,
            text=run.text if content else None,
        )
        begin = run.ended


def _tool(tool: ToolTrace, ended: float, origin: float, content: bool) -> TimelineTool:
    part = tool.part
    outcome: ToolOutcome = "unfinished"
    if isinstance(tool.outcome, AwaitsApproval):
        outcome = "waiting"
    elif part is not None:
        outcome = "retry" if isinstance(part, RetryPromptPart) else part.outcome
    return TimelineTool(
        name=tool.call.tool_name,
        begin_s=tool.began - origin,
        end_s=(ended if tool.ended is None else tool.ended) - origin,
        outcome=outcome,
        arguments=tool.call.args_json() if content else None,
        result=part.model_text() if content and part is not None else None,
    )
