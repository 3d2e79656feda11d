"""OpenTelemetry: the spans, their names and nesting, the metrics, and no content unless asked."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import anyio
import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import error_attributes, gen_ai_attributes
from opentelemetry.semconv._incubating.metrics import gen_ai_metrics
from opentelemetry.trace import StatusCode

from dspark_agent import (
    Agent,
    DSparkError,
    FunctionModel,
    ModelResponse,
    ModelRetry,
    ModelSettings,
    OutputError,
    RequestUsage,
    StepMetrics,
    TestModel,
    TextPart,
    ToolCallPart,
    ToolFailed,
    UsageLimits,
)
from dspark_agent.otel import Telemetry

KNOWN = {
    value
    for module in (gen_ai_attributes, error_attributes, gen_ai_metrics)
    for name, value in vars(module).items()
    if name.isupper() and isinstance(value, str)
}


class Collected:
    """A telemetry whose spans and metrics stay in memory."""

    def __init__(self, *, content: bool = False) -> None:
        self._exporter = InMemorySpanExporter()
        tracers = TracerProvider()
        tracers.add_span_processor(SimpleSpanProcessor(self._exporter))
        self._reader = InMemoryMetricReader()
        self._meters = MeterProvider([self._reader])
        self.telemetry = Telemetry(
            tracer_provider=tracers, meter_provider=self._meters, content=content
        )

    @property
    def spans(self) -> list[ReadableSpan]:
        """In the order in which they began."""
        return sorted(self._exporter.get_finished_spans(), key=lambda span: span.start_time or 0)

    def span(self, name: str) -> ReadableSpan:
        (found,) = (span for span in self.spans if span.name == name)
        return found

    def parent(self, name: str) -> str | None:
        parent = self.span(name).parent
        by_id = {span.context.span_id: span.name for span in self.spans if span.context}
        return None if parent is None else by_id[parent.span_id]

    def points(self, name: str) -> list[Any]:
        data = self._reader.get_metrics_data()
        assert data is not None
        return [
            point
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
            for point in metric.data.data_points
        ]


def add(a: int, b: int) -> int:
    """Add.

    Args:
        a: one.
        b: other.
    """
    return a + b


ACCOUNT = StepMetrics(
    queue_s=0.001, prefill_s=0.002, decode_s=0.003, ttft_s=0.0025, total_s=0.006, new_tokens=9,
    proposed={"model": 4, "dspark": 8}, accepted={"model": 4, "dspark": 5},
)  # fmt: skip


def accounted(*_: object) -> ModelResponse:
    return ModelResponse(
        parts=(TextPart(content="secret"),),
        metrics=ACCOUNT,
        model_name="m",
        usage=RequestUsage(output_tokens=9),
    )


def test_a_run_is_a_tree_of_spans() -> None:
    seen = Collected()
    agent = Agent(TestModel(), tools=[add], name="adder").instrument(seen.telemetry)
    result = agent.run_sync("go", model_settings=ModelSettings(temperature=0.5, max_tokens=9))

    assert [span.name for span in seen.spans if span.name not in ("prefill", "decode")] == [
        "invoke_agent adder", "step 1", "chat test", "execute_tool add", "step 2", "chat test",
    ]  # fmt: skip
    assert seen.parent("invoke_agent adder") is None
    assert seen.parent("step 1") == seen.parent("step 2") == "invoke_agent adder"
    assert seen.parent("execute_tool add") == "step 1"
    run = seen.span("invoke_agent adder").attributes
    assert run is not None
    assert run["gen_ai.provider.name"] == "test"
    assert run["gen_ai.usage.output_tokens"] == result.usage.output_tokens
    chat = next(span for span in seen.spans if span.name == "chat test")
    assert chat.attributes is not None
    assert chat.attributes["gen_ai.request.temperature"] == 0.5
    assert chat.attributes["gen_ai.request.max_tokens"] == 9
    assert chat.attributes["gen_ai.response.finish_reasons"] == ("tool_calls",)
    assert all(span.status.status_code is StatusCode.UNSET for span in seen.spans)


def test_every_gen_ai_name_is_one_of_the_conventions() -> None:
    seen = Collected(content=True)
    agent = Agent(TestModel(), tools=[add], instructions="be").instrument(seen.telemetry)
    agent.run_sync("go", model_settings=ModelSettings(seed=1, top_p=0.9, stop_sequences=["x"]))

    names = {name for span in seen.spans for name in span.attributes or ()}
    assert "gen_ai.input.messages" in names
    assert {name for name in names if not name.startswith("dspark.")} <= KNOWN
    metrics = ("operation.duration", "operation.time_to_first_chunk", "token.usage")
    for metric in metrics:
        assert f"gen_ai.client.{metric}" in KNOWN
        points = seen.points(f"gen_ai.client.{metric}")
        assert points
        assert {name for point in points for name in point.attributes} <= KNOWN


def test_the_account_is_in_the_spans_and_the_metrics() -> None:
    seen = Collected()
    Agent(FunctionModel(accounted), name="a").instrument(seen.telemetry).run_sync("go")

    chat = seen.span("chat function").attributes
    assert chat is not None
    assert chat["dspark.tokens.proposed.dspark"] == 8
    assert chat["dspark.tokens.accepted.dspark"] == 5
    assert chat["gen_ai.response.time_to_first_chunk"] == 0.0025
    for name, seconds in [("queue", 0.001), ("prefill", 0.002), ("decode", 0.003)]:
        span = seen.span(name)
        assert seen.parent(name) == "chat function"
        assert span.start_time is not None
        assert span.end_time is not None
        assert (span.end_time - span.start_time) / 1e9 == pytest.approx(seconds, rel=1e-3)
    assert seen.span("queue").end_time == seen.span("prefill").start_time

    accepted = seen.points("dspark.tokens.accepted")
    assert {p.attributes["dspark.token.source"]: p.value for p in accepted} == {
        "model": 4,
        "dspark": 5,
    }
    parts = {
        p.attributes["dspark.step.part"]: p.sum for p in seen.points("dspark.step.part.duration")
    }
    assert parts["prefill"] == 0.002
    (output,) = (
        p
        for p in seen.points("gen_ai.client.token.usage")
        if p.attributes["gen_ai.token.type"] == "output"
    )
    assert output.sum == 9


def shout(word: str) -> str:
    """Shout.

    Args:
        word: what.
    """
    return "secret result"


def secretive(messages: list[Any], *_: object) -> ToolCallPart | str:
    asked = ToolCallPart(tool_name="shout", args={"word": "secret word"})
    return asked if len(messages) == 1 else "secret answer"


@pytest.mark.parametrize("content", [False, True])
def test_what_was_said_is_recorded_only_where_it_was_asked_for(content: bool) -> None:
    seen = Collected(content=content)
    agent = Agent(FunctionModel(secretive), tools=[shout], instructions="secret rule")
    agent.instrument(seen.telemetry).run_sync("secret prompt")

    dumped = "\n".join(span.to_json() for span in seen.spans)
    for said in ("secret prompt", "secret word", "secret result", "secret answer", "secret rule"):
        assert (said in dumped) is content
    if content:
        last = [span for span in seen.spans if span.name == "chat function"][-1].attributes
        assert last is not None
        (told,) = json.loads(str(last["gen_ai.input.messages"]))
        assert (told["role"], told["parts"][0]["response"]) == ("tool", "secret result")
        (said_,) = json.loads(str(last["gen_ai.output.messages"]))
        assert said_["parts"] == [{"type": "text", "content": "secret answer"}]
        assert said_["finish_reason"] == "stop"


def test_an_error_is_named_without_what_it_quotes() -> None:
    seen = Collected()
    agent: Agent[object, int] = Agent(
        FunctionModel(lambda *_: "secret"), output_type=int, retries=0, name="a"
    )
    with pytest.raises(OutputError):
        agent.instrument(seen.telemetry).run_sync("go")

    for name in ("invoke_agent a", "step 1"):
        span = seen.span(name)
        assert span.status.status_code is StatusCode.ERROR
        assert span.attributes is not None
        assert span.attributes["error.type"] == "OutputError"
    assert "secret" not in "\n".join(span.to_json() for span in seen.spans)
    failed = [p for p in seen.points("gen_ai.client.operation.duration")
              if p.attributes.get("error.type") == "OutputError"]  # fmt: skip
    assert len(failed) == 1


@pytest.mark.parametrize(
    ("error", "outcome"), [(ModelRetry("again"), "retry"), (ToolFailed("broken"), "failed")]
)
def test_a_tool_that_complains_is_an_error_of_its_span_alone(
    error: Exception, outcome: str
) -> None:
    def fussy() -> str:
        """Fuss."""
        raise error

    answers = iter([ToolCallPart(tool_name="fussy"), "never mind"])
    seen = Collected()
    agent = Agent(FunctionModel(lambda *_: next(answers)), tools=[fussy])
    agent.instrument(seen.telemetry).run_sync("go")

    tool = seen.span("execute_tool fussy")
    assert tool.attributes is not None
    assert tool.attributes["dspark.tool.outcome"] == tool.attributes["error.type"] == outcome
    assert tool.status.status_code is StatusCode.ERROR
    assert seen.span("step 1").status.status_code is StatusCode.UNSET


@pytest.mark.anyio
async def test_an_agent_inside_a_tool_is_part_of_the_trace() -> None:
    seen = Collected()
    helper = Agent(TestModel(custom_output_text="helped"), name="helper")

    async def ask() -> str:
        """Ask."""
        return (await helper.run("help")).output

    boss = Agent(TestModel(), tools=[ask], name="boss").instrument(seen.telemetry)
    helper.instrument(seen.telemetry)  # told once all the same
    await boss.run("go")
    await helper.run("alone")

    inner, alone = (span for span in seen.spans if span.name == "invoke_agent helper")
    assert inner.parent is not None
    tool = seen.span("execute_tool ask")
    assert tool.context is not None
    assert inner.parent.span_id == tool.context.span_id
    assert alone.parent is None


@pytest.mark.anyio
async def test_a_run_past_its_deadline_ends_all_its_spans() -> None:
    async def stall() -> str:
        """Stall."""
        await anyio.sleep(60)
        return ""

    seen = Collected()
    agent = Agent(TestModel(), tools=[stall], name="a").instrument(seen.telemetry)
    with pytest.raises(DSparkError):
        await agent.run("go", limits=UsageLimits(wall_seconds=0.05))
    for name in ("invoke_agent a", "step 1", "execute_tool stall"):
        attributes = seen.span(name).attributes
        assert attributes is not None
        assert attributes["error.type"] == "cancelled"


@pytest.mark.anyio
async def test_sessions_and_parallel_forks_have_conversations_of_their_own() -> None:
    seen = Collected()
    agent = Agent(TestModel(), name="a").instrument(seen.telemetry)
    async with agent.session() as session:
        await session.step("one")
        async with await session.fork() as fork, anyio.create_task_group() as group:
            group.start_soon(session.step, "two")
            group.start_soon(fork.step, "three")
    steps = [span for span in seen.spans if span.name.startswith("step")]
    ids = [(span.attributes or {})["gen_ai.conversation.id"] for span in steps]
    assert len(ids) == 3
    assert len(set(ids)) == 2
    assert all(span.parent is None for span in steps)


def test_it_is_off_unless_it_is_asked_for() -> None:
    code = """
import sys
import dspark_agent
dspark_agent.Agent(dspark_agent.TestModel()).run_sync("Hi")
assert not [name for name in sys.modules if name.startswith("opentelemetry")]
sys.modules["opentelemetry"] = None
try:
    import dspark_agent.otel
except ImportError as error:
    assert "pip install 'dspark-agent[otel]'" in str(error), error
else:
    raise AssertionError("imported without OpenTelemetry")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
