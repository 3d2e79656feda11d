"""The seam between agents and models: what a turn may emit, and what comes back.

A :class:`Model` opens :class:`ModelSession`\\ s; a session holds one conversation and is only ever
told what is new, so that a model with a token log never renders or computes anything twice.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from dspark_agent.messages import ModelRequest, ModelResponse, ToolCallPart
from dspark_agent.settings import ModelSettings
from dspark_agent.tools import ToolDefinition
from dspark_agent.urgency import Urgency

ToolChoice = str
"""``"auto"``, ``"required"``, ``"none"``, or the name of the one tool to call."""


@dataclass(frozen=True, slots=True)
class ModelTurn:
    """What one model turn may emit: tool calls and/or a typed result and/or text.

    ``tools`` is this turn's choice, a part of the tools the session was opened with.
    ``tool_choice`` is ``auto``, ``required``, ``none`` or a tool's name. ``output_schema`` is a
    JSON Schema of type object for the typed result, None when there is none. ``output_tools`` are
    the names of those of the tools whose call is the answer. ``urgency`` and ``deadline_s``
    (seconds from now, None for any time) say how soon it is wanted: hints for a model that many
    share. ``agent`` is whose turn it is, where that is said: a model may be quicker where an agent
    reads or writes what it has read or written in another conversation.
    """

    tools: tuple[ToolDefinition, ...] = ()
    tool_choice: ToolChoice = "auto"
    output_schema: Mapping[str, Any] | None = None
    allow_text: bool = True
    settings: ModelSettings = field(default_factory=ModelSettings)
    output_tools: tuple[str, ...] = ()
    urgency: Urgency = "interactive"
    deadline_s: float | None = None
    agent: str = ""

    @property
    def tool_names(self) -> tuple[str, ...]:
        return tuple(tool.name for tool in self.tools)


@dataclass(frozen=True, slots=True)
class TextChunk:
    """More text, or more of a typed result's JSON."""

    delta: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """The turn's ``index``-th call has a name."""

    index: int
    tool_name: str


@dataclass(frozen=True, slots=True)
class CallChunk:
    """More of the JSON of that call's arguments."""

    index: int
    delta: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """That call is complete."""

    index: int
    call: ToolCallPart


@dataclass(frozen=True, slots=True)
class TokensWritten:
    """``tokens`` tokens were committed, which ``source`` proposed: ``"model"``, ``"forced"`` (by
    the grammar) or a proposer's name. ``text`` is how the model writes them, markup included. Only
    models that know who proposed a token say so, before the events that the text leads to."""

    tokens: int
    source: str
    text: str


ModelEvent = TextChunk | CallStart | CallChunk | CallEnd | TokensWritten
Emit = Callable[[ModelEvent], Awaitable[None]]
"""Where a session's turn sends its events, in order."""


class ModelSession(ABC):
    """One conversation with a model. One turn at a time.

    A turn commits whole or not at all: when :meth:`step` raises (cancellation included), the
    session is as it was before.
    """

    @abstractmethod
    async def step(
        self, messages: Sequence[ModelRequest | ModelResponse], turn: ModelTurn, emit: Emit
    ) -> ModelResponse:
        """Add ``messages`` (those since the last turn) and let the model write one response.

        The response counts as added. Before the first turn, ``messages`` may hold a whole
        history. ``metrics`` of the response covers the model's part of the step.

        Raises:
            ModelError: the model failed.
            SchemaError: this model cannot honour one of the turn's schemas.
        """

    async def anticipate(  # noqa: B027 - to wait is a fine default
        self, calls: Sequence[ToolCallPart], turn: ModelTurn
    ) -> None:
        """The last response's ``calls`` are being run and ``turn`` is likely to follow them: the
        time for whatever of it is certain already.

        Cancelled when the results are there. Changes nothing that is said.
        """

    @abstractmethod
    def mark(self) -> object:
        """Where the conversation stands, for :meth:`rollback`."""

    @abstractmethod
    async def rollback(self, mark: object) -> None:
        """Forget everything since ``mark``."""

    @abstractmethod
    async def fork(self) -> ModelSession:
        """An independent conversation that starts with everything said in this one."""

    @property
    def token_log(self) -> tuple[int, ...] | None:
        """The tokens of the conversation so far, where the model keeps them."""
        return None

    @property
    def context_window(self) -> int | None:
        """How many tokens a conversation may hold, where the model knows."""
        return None

    async def close(self) -> None:  # noqa: B027 - nothing to free is a fine default
        """Free what the session holds."""


class Model(ABC):
    """A model that agents talk to. Safe to share between agents and tasks."""

    settings: ModelSettings | None = None
    """The model's own defaults, under those of agent, run and step."""
    provider: str = "custom"
    """Who runs it, as telemetry names it: OpenTelemetry's ``gen_ai.provider.name``."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What the model is called, as recorded in responses and history."""

    @abstractmethod
    async def open(
        self, widest: ModelTurn, *, token_log: Sequence[int] | None = None
    ) -> ModelSession:
        """Start a conversation of an agent.

        ``widest`` is the turn of a step that nothing narrows: its tools are those of the whole
        conversation. ``token_log`` resumes one of this model's own: its messages count as said.

        Raises:
            ModelNotFoundError: the model cannot be had.
            SchemaError: this model cannot honour one of the schemas.
        """

    async def close(self) -> None:  # noqa: B027 - nothing to free is a fine default
        """Free what the model holds (weights, threads, connections)."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()


class TranscriptSession(ModelSession):
    """A conversation with a model that is sent all messages each time; the base of such models."""

    def __init__(self) -> None:
        self._messages: list[ModelRequest | ModelResponse] = []

    @abstractmethod
    async def respond(
        self, messages: Sequence[ModelRequest | ModelResponse], turn: ModelTurn, emit: Emit
    ) -> ModelResponse:
        """Answer the whole conversation."""

    @abstractmethod
    def _empty_copy(self) -> TranscriptSession:
        """A session like this one, with nothing said yet."""

    async def step(
        self, messages: Sequence[ModelRequest | ModelResponse], turn: ModelTurn, emit: Emit
    ) -> ModelResponse:
        transcript = [*self._messages, *messages]
        response = await self.respond(transcript, turn, emit)
        self._messages = [*transcript, response]
        return response

    def mark(self) -> object:
        return len(self._messages)

    async def rollback(self, mark: object) -> None:
        assert isinstance(mark, int)
        del self._messages[mark:]

    async def fork(self) -> ModelSession:
        child = self._empty_copy()
        child._messages = list(self._messages)
        return child
