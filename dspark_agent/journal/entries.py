"""The entries of a run's journal, in the order in which they come about.

A run is begun once. Each step has one ``model-output``, then a ``tool-begun`` and a ``tool-ended``
for each call that is run (only the latter for one that is not), then one ``step-ended``. Before a
step there may be ``compacted`` entries.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, TypeAdapter

from dspark_agent.deferred import AwaitsApproval, DeferredToolResults
from dspark_agent.events import CompactionReason
from dspark_agent.history import History
from dspark_agent.limits import RequestUsage
from dspark_agent.messages import (
    ModelRequest,
    ModelResponse,
    RetryPromptPart,
    ToolCallPart,
    ToolReturnPart,
)
from dspark_agent.metrics import StepMetrics
from dspark_agent.models.base import ModelTurn

FORMAT = 1
"""Version of the entries; a journal of another one is refused."""


TokenLog = tuple[int, ...] | None


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class RunBegun(_Entry):
    """What the run was asked, on what history, of which agent."""

    kind: Literal["run-begun"] = "run-begun"
    format: int = FORMAT
    agent: str
    model_name: str
    tool_names: tuple[str, ...]
    prompt: str | None
    history: History


class Instructions(_Entry):
    """An agent's instructions as its functions gave them before step ``step``: when the run began,
    or when the agent took over."""

    kind: Literal["instructions"] = "instructions"
    step: int
    text: str


class ModelOutput(_Entry):
    """What the model wrote in a step.

    ``request`` is the :func:`fingerprint` of what it was asked. The token log of ``log_owner`` (a
    model and a set of tools) is the first ``kept`` tokens of the one before the step, then
    ``tokens``; None where the model has none.
    """

    kind: Literal["model-output"] = "model-output"
    step: int
    request: str
    response: ModelResponse
    log_owner: str
    kept: int = 0
    tokens: tuple[int, ...] | None = None

    def log_after(self, before: TokenLog, owner: str) -> TokenLog:
        """The token log after the step; None where it is not ``owner``'s, or not known."""
        before = before or ()
        if self.tokens is None or self.log_owner != owner or self.kept > len(before):
            return None
        return before[: self.kept] + self.tokens


class ToolBegun(_Entry):
    """A tool is about to be called. ``index`` is the call's place among those run together;
    ``approved`` tells a step's calls that had waited for approval from those run at once."""

    kind: Literal["tool-begun"] = "tool-begun"
    step: int
    approved: bool
    index: int
    call: ToolCallPart


class ToolEnded(_Entry):
    """What came of a call."""

    kind: Literal["tool-ended"] = "tool-ended"
    step: int
    approved: bool
    index: int
    outcome: Annotated[
        ToolReturnPart | RetryPromptPart | AwaitsApproval, Discriminator("part_kind")
    ]


class StepEnded(_Entry):
    """A step is over; ``retry_reason`` is why it is taken again, None where it stands. ``told`` is
    what the model read about calls of output tools, in their order."""

    kind: Literal["step-ended"] = "step-ended"
    step: int
    retry_reason: str | None
    told: tuple[Annotated[ToolReturnPart | RetryPromptPart, Discriminator("part_kind")], ...] = ()
    metrics: StepMetrics


class Decided(_Entry):
    """What was decided about the calls of a step that waited for approval."""

    kind: Literal["decided"] = "decided"
    step: int
    results: DeferredToolResults


class Compacted(_Entry):
    """Before step ``step``, the messages before index ``kept`` gave way to a summary, for the
    ``number``-th time (from 0)."""

    kind: Literal["compacted"] = "compacted"
    number: int
    step: int
    reason: CompactionReason
    kept: int
    summary: str
    usage: RequestUsage


class RunEnded(_Entry):
    """The run has its output."""

    kind: Literal["run-ended"] = "run-ended"


JournalEntry = (
    RunBegun
    | Instructions
    | ModelOutput
    | ToolBegun
    | ToolEnded
    | StepEnded
    | Decided
    | Compacted
    | RunEnded
)
ENTRY: TypeAdapter[JournalEntry] = TypeAdapter(
    Annotated[JournalEntry, Discriminator("kind")], config=ConfigDict(defer_build=True)
)
"""Reads an entry from JSON."""


def growth(before: TokenLog, after: TokenLog) -> tuple[int, TokenLog]:
    """How many tokens a log kept, and those it has after them."""
    if after is None:
        return 0, None
    kept = len(before) if before and after[: len(before)] == before else 0
    return kept, after[kept:]


def fingerprint(messages: Sequence[ModelRequest | ModelResponse], turn: ModelTurn) -> str:
    """What a model was asked and what it might emit, as a hash; times and limits left out."""
    asked = [part.model_dump(mode="json") for message in messages for part in message.parts]
    might = [turn.tool_names, turn.tool_choice, turn.output_schema, turn.allow_text]
    text = json.dumps([asked, might], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
