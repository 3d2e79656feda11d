"""What a caller sees while steps are being taken: small frozen values, in order.

``step`` is the step's number in its session; ``index`` the call's place within the step.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from dspark_agent.limits import RequestUsage
from dspark_agent.messages import (
    ModelRequest,
    ModelResponse,
    RetryPromptPart,
    ToolCallPart,
    ToolReturnPart,
)

if TYPE_CHECKING:
    from dspark_agent.step import StepKind, StepResult


@dataclass(frozen=True, slots=True)
class StepStart:
    """A model turn begins; ``attempt`` counts from 1 where a refused step is taken again."""

    step: int
    kind: StepKind
    attempt: int = 1


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More of the text, or of a typed result's JSON."""

    step: int
    delta: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """The model has named the tool it calls; its arguments follow."""

    step: int
    index: int
    tool_name: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """More of the JSON of a call's arguments."""

    step: int
    index: int
    delta: str


@dataclass(frozen=True, slots=True)
class ToolCallEnd:
    """A call is complete; it runs from now on, or once the model's turn is over: one of a
    ``sequential`` tool or of one that may need approval and those after it, and all of a run with
    hooks or a journal."""

    step: int
    index: int
    call: ToolCallPart


@dataclass(frozen=True, slots=True)
class ToolResult:
    """A call has been run (or refused); ``seconds`` of wall clock. Comes after the model's turn."""

    step: int
    index: int
    part: ToolReturnPart | RetryPromptPart
    seconds: float


@dataclass(frozen=True, slots=True)
class PartialOutput:
    """The typed result so far: ``data`` is its JSON, ``value`` the typed reading or None."""

    step: int
    data: Any
    value: Any


@dataclass(frozen=True, slots=True)
class StepEnd:
    """A step is done: ``result.metrics`` says where its time went, ``result.retry_reason`` why it
    is taken again, if it is."""

    step: int
    result: StepResult[Any]


class CompactionReason(StrEnum):
    """Why a conversation was shortened."""

    SHARE = "share"
    """More of the window was in use than :class:`Compaction` allows."""
    OVERFLOW = "overflow"
    """A turn did not fit into the window."""


@dataclass(frozen=True, slots=True)
class ContextCompacted:
    """The conversation was shortened before step ``step``; see :class:`Compaction`.

    ``summary`` stands in for ``left_out``, the messages that the model no longer sees.
    ``context_tokens`` is the context's length before, 0 where it is not known. ``usage`` and
    ``seconds`` are what the summary took; they are part of no step's metrics.
    """

    step: int
    reason: CompactionReason
    context_tokens: int
    summary: str
    left_out: tuple[ModelRequest | ModelResponse, ...]
    usage: RequestUsage
    seconds: float


AgentEvent = (
    StepStart
    | TextDelta
    | ToolCallStart
    | ToolCallDelta
    | ToolCallEnd
    | ToolResult
    | PartialOutput
    | ContextCompacted
    | StepEnd
)
