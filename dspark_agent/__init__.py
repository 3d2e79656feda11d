"""dspark-agent: agents whose model runs in the same process.

The public surface. Importing it loads neither torch nor an HTTP client: the two models that need
them come on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dspark_agent.agent import Agent
from dspark_agent.context import RunContext
from dspark_agent.errors import (
    ContextLengthError,
    DeadlineExceeded,
    DSparkError,
    ModelError,
    ModelHTTPError,
    ModelNotFoundError,
    ModelRetry,
    OutputError,
    RunCancelled,
    SchemaError,
    SessionClosedError,
    ToolFailed,
    ToolRetriesExceeded,
    UnexpectedModelBehavior,
    UsageLimitExceeded,
    UserError,
)
from dspark_agent.events import (
    AgentEvent,
    PartialOutput,
    StepEnd,
    StepStart,
    TextDelta,
    ToolCallDelta,
    ToolCallEnd,
    ToolCallStart,
    ToolResult,
)
from dspark_agent.history import History
from dspark_agent.limits import RequestUsage, RunUsage, UsageLimits
from dspark_agent.messages import (
    FinishReason,
    ModelMessage,
    ModelMessagesTypeAdapter,
    ModelRequest,
    ModelResponse,
    RetryPromptPart,
    SystemPromptPart,
    TextPart,
    ToolCallPart,
    ToolReturnPart,
    UserPromptPart,
)
from dspark_agent.metrics import StepMetrics
from dspark_agent.models import infer_model
from dspark_agent.models.base import Model, ModelSession, ModelTurn
from dspark_agent.models.testing import FunctionModel, TestModel
from dspark_agent.output import JsonSchema
from dspark_agent.run import AgentRun, RunResult
from dspark_agent.session import Session
from dspark_agent.settings import ModelSettings
from dspark_agent.step import StepKind, StepResult
from dspark_agent.stream import EventStream
from dspark_agent.timeline import Timeline
from dspark_agent.tools import Tool, ToolDefinition, tool
from dspark_agent.toolset import FunctionToolset
from dspark_agent.trace import Recording

if TYPE_CHECKING:
    from dspark_agent.models.dspark import DSparkModel
    from dspark_agent.models.openai import OpenAIModel

__all__ = [
    "Agent",
    "AgentEvent",
    "AgentRun",
    "ContextLengthError",
    "DSparkError",
    "DSparkModel",
    "DeadlineExceeded",
    "EventStream",
    "FinishReason",
    "FunctionModel",
    "FunctionToolset",
    "History",
    "JsonSchema",
    "Model",
    "ModelError",
    "ModelHTTPError",
    "ModelMessage",
    "ModelMessagesTypeAdapter",
    "ModelNotFoundError",
    "ModelRequest",
    "ModelResponse",
    "ModelRetry",
    "ModelSession",
    "ModelSettings",
    "ModelTurn",
    "OpenAIModel",
    "OutputError",
    "PartialOutput",
    "Recording",
    "RequestUsage",
    "RetryPromptPart",
    "RunCancelled",
    "RunContext",
    "RunResult",
    "RunUsage",
    "SchemaError",
    "Session",
    "SessionClosedError",
    "StepEnd",
    "StepKind",
    "StepMetrics",
    "StepResult",
    "StepStart",
    "SystemPromptPart",
    "TestModel",
    "TextDelta",
    "TextPart",
    "Timeline",
    "Tool",
    "ToolCallDelta",
    "ToolCallEnd",
    "ToolCallPart",
    "ToolCallStart",
    "ToolDefinition",
    "ToolFailed",
    "ToolResult",
    "ToolRetriesExceeded",
    "ToolReturnPart",
    "UnexpectedModelBehavior",
    "UsageLimitExceeded",
    "UsageLimits",
    "UserError",
    "UserPromptPart",
    "infer_model",
    "tool",
]


def __getattr__(name: str) -> Any:
    if name == "DSparkModel":
        from dspark_agent.models.dspark import DSparkModel

        return DSparkModel
    if name == "OpenAIModel":
        from dspark_agent.models.openai import OpenAIModel

        return OpenAIModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
