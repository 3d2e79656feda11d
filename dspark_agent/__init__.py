"""dspark-agent: agents whose model runs in the same process.

The public surface. Importing it loads neither torch nor an HTTP client: the two models that need
them come on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dspark_agent.agent import Agent
from dspark_agent.compaction import Compaction
from dspark_agent.concurrency import fan_out
from dspark_agent.context import RunContext
from dspark_agent.deferred import (
    DeferredToolRequests,
    DeferredToolResults,
    ToolApproved,
    ToolDenied,
)
from dspark_agent.delegation import Handoff
from dspark_agent.errors import (
    ApprovalRequired,
    ContextLengthError,
    DeadlineExceeded,
    DSparkError,
    GuardrailTripped,
    JournalError,
    JournalLockedError,
    ModelError,
    ModelHTTPError,
    ModelNotFoundError,
    ModelRetry,
    OutputError,
    RunCancelled,
    SchemaError,
    SessionClosedError,
    ToolFailed,
    ToolInterruptedError,
    ToolRetriesExceeded,
    UnexpectedModelBehavior,
    UsageLimitExceeded,
    UserError,
)
from dspark_agent.events import (
    AgentEvent,
    ContextCompacted,
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
from dspark_agent.hooks import Hooks
from dspark_agent.journal.base import Journal
from dspark_agent.journal.sqlite import SqliteJournal
from dspark_agent.json_schema import JsonSchema
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
from dspark_agent.outputs import NativeOutput, PromptedOutput, TextOutput, ToolOutput
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
    "ApprovalRequired",
    "Compaction",
    "ContextCompacted",
    "ContextLengthError",
    "DSparkError",
    "DSparkModel",
    "DeadlineExceeded",
    "DeferredToolRequests",
    "DeferredToolResults",
    "EventStream",
    "FinishReason",
    "FunctionModel",
    "FunctionToolset",
    "GuardrailTripped",
    "Handoff",
    "History",
    "Hooks",
    "Journal",
    "JournalError",
    "JournalLockedError",
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
    "NativeOutput",
    "OpenAIModel",
    "OutputError",
    "PartialOutput",
    "PromptedOutput",
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
    "SqliteJournal",
    "StepEnd",
    "StepKind",
    "StepMetrics",
    "StepResult",
    "StepStart",
    "SystemPromptPart",
    "TestModel",
    "TextDelta",
    "TextOutput",
    "TextPart",
    "Timeline",
    "Tool",
    "ToolApproved",
    "ToolCallDelta",
    "ToolCallEnd",
    "ToolCallPart",
    "ToolCallStart",
    "ToolDefinition",
    "ToolDenied",
    "ToolFailed",
    "ToolInterruptedError",
    "ToolOutput",
    "ToolResult",
    "ToolRetriesExceeded",
    "ToolReturnPart",
    "UnexpectedModelBehavior",
    "UsageLimitExceeded",
    "UsageLimits",
    "UserError",
    "UserPromptPart",
    "fan_out",
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
