"""The engine's words in the SDK's: events, errors, metrics, and what a turn asks for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

from dspark_agent.errors import (
    ContextLengthError,
    DSparkError,
    ModelError,
    ModelNotFoundError,
    SchemaError,
    SessionClosedError,
    UserError,
)
from dspark_agent.messages import FinishReason, ResponsePart, ToolCallPart
from dspark_agent.metrics import StepMetrics
from dspark_agent.models.base import (
    CallChunk,
    CallEnd,
    CallStart,
    ModelEvent,
    ModelTurn,
    TextChunk,
)
from dspark_agent.models.chat import function_tools
from dspark_agent.settings import ModelSettings
from dspark_backend import errors as backend
from dspark_backend.grammar import events as parsed
from dspark_backend.grammar.spec import TurnSpec
from dspark_backend.metrics import EngineMetrics
from dspark_backend.request import FinishReason as EngineFinish
from dspark_backend.request import ForcedMode, SamplingParams, StepOutcome


def model_event(event: parsed.TurnEvent) -> ModelEvent:
    """What a listener of the SDK hears."""
    match event:
        case parsed.TextDelta(text) | parsed.ObjectDelta(text):
            return TextChunk(text)
        case parsed.ToolCallStart(index, name):
            return CallStart(index, name)
        case parsed.ToolCallArgsDelta(index, fragment):
            return CallChunk(index, fragment)
        case parsed.ToolCallEnd(index, name, arguments):
            return CallEnd(index, ToolCallPart(tool_name=name, args=arguments))


def turn_spec(turn: ModelTurn) -> TurnSpec:
    """What the turn may emit, for the engine's grammar."""
    named = turn.tool_choice not in ("auto", "required", "none")
    return TurnSpec(
        tools=function_tools(turn.tools),
        tool_choice={"name": turn.tool_choice} if named else turn.tool_choice,  # type: ignore[arg-type]
        output_schema=turn.output_schema,
        allow_text=turn.allow_text,
        parallel_tool_calls=turn.settings.get("parallel_tool_calls", False),
    )


def forced_mode(settings: ModelSettings) -> ForcedMode:
    """How tokens without a choice are taken; ``canonical`` where the settings do not say."""
    return ForcedMode(settings.get("forced", ForcedMode.CANONICAL))


def sampling_params(settings: ModelSettings) -> SamplingParams:
    """The settings that the sampler knows; the rest are not its."""
    names = SamplingParams.__dataclass_fields__
    return SamplingParams(**{key: value for key, value in settings.items() if key in names})  # type: ignore[arg-type]


def step_metrics(engine: EngineMetrics, prepared_s: float, compile_s: float) -> StepMetrics:
    """The engine's account with what came before it: rendering (overhead) and compiling."""
    account = asdict(engine)
    account["ttft_s"] += prepared_s
    account["total_s"] += prepared_s
    account["grammar_s"] += compile_s
    account["overhead_s"] += prepared_s - compile_s
    return StepMetrics(**account)


def finish_reason(outcome: StepOutcome, parts: Sequence[ResponsePart]) -> FinishReason:
    """Why the turn ended: at its length, with a call, or of itself."""
    if outcome.finish_reason is EngineFinish.LENGTH:
        return FinishReason.LENGTH
    calls = any(isinstance(part, ToolCallPart) for part in parts)
    return FinishReason.TOOL_CALL if calls else FinishReason.STOP


_OURS: tuple[tuple[type[backend.BackendError], type[DSparkError]], ...] = (
    (backend.ModelNotFoundError, ModelNotFoundError),
    (backend.DownloadError, ModelNotFoundError),
    (backend.ContextLengthError, ContextLengthError),
    (backend.GrammarError, SchemaError),
    (backend.RequestError, UserError),
    (backend.SessionClosedError, SessionClosedError),
    (backend.BackendError, ModelError),
)


@contextmanager
def translated_errors() -> Iterator[None]:
    """The engine's errors as the SDK's, message unchanged."""
    try:
        yield
    except backend.BackendError as error:
        ours = next(ours for theirs, ours in _OURS if isinstance(error, theirs))
        raise ours(str(error)) from error
