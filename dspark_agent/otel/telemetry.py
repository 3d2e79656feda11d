"""An observer that writes spans and metrics."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from opentelemetry import metrics, trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.util.types import AttributeValue

from dspark_agent.deferred import AwaitsApproval
from dspark_agent.messages import ModelRequest, ModelResponse, RetryPromptPart
from dspark_agent.models.base import ModelTurn
from dspark_agent.otel.attributes import request, said, told, usage
from dspark_agent.otel.attributes import response as answered
from dspark_agent.otel.instruments import Instruments
from dspark_agent.trace import RunTrace, StepTrace, ToolTrace

SCOPE = "dspark_agent"
EMBEDDED = "dspark"
PHASES = ("queue", "prefill", "decode")
"""The parts of the model's turn that get spans of their own, in the order of their begin."""


class Telemetry:
    """Spans and metrics of the agents that are given it: ``agent.instrument(Telemetry())``.

    A run is an ``invoke_agent`` span; in it every step a ``step`` span; in that the model's turn
    (``chat``, with ``queue``, ``prefill`` and ``decode``) and its ``execute_tool`` spans. Agents
    that run inside a tool are told of too, whether or not they were instrumented themselves.

    Args:
        tracer_provider: where spans go; the process's own by default.
        meter_provider: where metrics go; the process's own by default.
        content: whether to record what was said, called and returned, and the text of errors.
    """

    def __init__(
        self,
        *,
        tracer_provider: trace.TracerProvider | None = None,
        meter_provider: metrics.MeterProvider | None = None,
        content: bool = False,
    ) -> None:
        self._tracer = trace.get_tracer(SCOPE, tracer_provider=tracer_provider)
        self._instruments = Instruments(metrics.get_meter(SCOPE, meter_provider=meter_provider))
        self._content = content

    @contextmanager
    def run(self, run: RunTrace) -> Iterator[None]:
        """The ``invoke_agent`` span."""
        attributes = _who(run, "invoke_agent")
        with (
            self._span(f"invoke_agent {run.agent}", attributes) as span,
            self._instruments.duration(attributes),
        ):
            yield
            if run.usage is not None:
                span.set_attributes(usage(run.usage))

    @contextmanager
    def step(self, step: StepTrace) -> Iterator[None]:
        """The ``step`` span, and what the step cost."""
        attributes: dict[str, AttributeValue] = {
            "gen_ai.agent.name": step.agent,
            "gen_ai.conversation.id": step.conversation_id,
            "dspark.step.index": step.index,
            "dspark.step.kind": step.kind.value,
            "dspark.step.attempt": step.attempt,
        }
        with self._span(f"step {step.index + 1}", attributes) as span:
            yield
            span.set_attribute("dspark.step.replayed", step.is_replayed)
            span.set_attribute("dspark.step.refused", step.retry_reason is not None)
            if self._content and step.retry_reason is not None:
                span.set_attribute("dspark.step.retry_reason", step.retry_reason)
            if step.metrics is not None and not step.is_replayed:
                self._instruments.step(step, step.metrics)

    @contextmanager
    def turn(
        self, step: StepTrace, messages: Sequence[ModelRequest | ModelResponse], turn: ModelTurn
    ) -> Iterator[None]:
        """The ``chat`` span: what was asked, how it was answered, and how long that took. None for
        an answer out of a journal, which was told of when it was given."""
        if step.is_replayed:
            yield
            return
        attributes = _who(step, "chat")
        kind = SpanKind.INTERNAL if step.provider == EMBEDDED else SpanKind.CLIENT
        with (
            self._span(f"chat {step.model}", attributes | request(turn), kind) as span,
            self._instruments.duration(attributes),
        ):
            if self._content:
                span.set_attributes(told(messages, turn))
            yield
            if step.response is not None:
                span.set_attributes(answered(step.response))
                if self._content:
                    span.set_attributes(said(step.response))
                self._phases(step, step.response)
                self._instruments.turn(attributes, step.response)

    @contextmanager
    def tool(self, tool: ToolTrace) -> Iterator[None]:
        """The ``execute_tool`` span."""
        name = tool.call.tool_name
        attributes: dict[str, AttributeValue] = {
            "gen_ai.operation.name": "execute_tool",
            "gen_ai.tool.name": name,
            "gen_ai.tool.type": "function",
            "gen_ai.tool.call.id": tool.call.tool_call_id,
        }
        with self._span(f"execute_tool {name}", attributes) as span:
            if self._content:
                span.set_attribute("gen_ai.tool.call.arguments", tool.call.args_json())
            yield
            if isinstance(tool.outcome, AwaitsApproval):
                span.set_attribute("dspark.tool.outcome", "waiting")
            if tool.part is None:
                return
            is_retry = isinstance(tool.part, RetryPromptPart)
            outcome = "retry" if isinstance(tool.part, RetryPromptPart) else tool.part.outcome
            span.set_attribute("dspark.tool.outcome", outcome)
            if outcome != "success":
                span.set_attribute("error.type", "retry" if is_retry else "failed")
                span.set_status(Status(StatusCode.ERROR, outcome))
            if self._content:
                span.set_attribute("gen_ai.tool.call.result", tool.part.model_text())

    @contextmanager
    def _span(
        self,
        name: str,
        attributes: Mapping[str, AttributeValue],
        kind: SpanKind = SpanKind.INTERNAL,
    ) -> Iterator[Span]:
        with self._tracer.start_as_current_span(
            name,
            kind=kind,
            attributes=attributes,
            # An error's message may quote what was said.
            record_exception=self._content,
            set_status_on_exception=False,
        ) as span:
            try:
                yield span
            except BaseException as error:
                span.set_attribute("error.type", _error_type(error))
                span.set_status(Status(StatusCode.ERROR, _error_type(error)))
                raise

    def _phases(self, step: StepTrace, response: ModelResponse) -> None:
        """Spans for what the engine says it did, once it is known."""
        at = time.time_ns() - int((time.perf_counter() - step.began) * 1e9)
        for phase in PHASES:
            seconds = getattr(response.metrics, f"{phase}_s")
            if seconds > 0:
                end = at + int(seconds * 1e9)
                self._tracer.start_span(phase, start_time=at).end(end)
                at = end


def _error_type(error: BaseException) -> str:
    """The error's class; a cancellation goes by one name on every event loop."""
    return type(error).__name__ if isinstance(error, Exception) else "cancelled"


def _who(of: RunTrace | StepTrace, operation: str) -> dict[str, AttributeValue]:
    return {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": of.provider,
        "gen_ai.request.model": of.model,
        "gen_ai.agent.name": of.agent,
        "gen_ai.conversation.id": of.conversation_id,
    }
