"""The keywords of agents and of their runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypedDict

from dspark_agent.compaction import Compaction
from dspark_agent.context import DepsT, RunContext
from dspark_agent.history import History
from dspark_agent.hooks import Hooks
from dspark_agent.limits import UsageLimits
from dspark_agent.messages import ModelRequest, ModelResponse
from dspark_agent.models.base import Model
from dspark_agent.relay import EventHandler
from dspark_agent.settings import ModelSettings
from dspark_agent.tools import Tool
from dspark_agent.toolset import FunctionToolset


class RunOptions(TypedDict, Generic[DepsT], total=False):
    """Keywords of every way to run an agent.

    ``deps``: what tools find in ``ctx.deps``. ``message_history``: messages or a History to go on
    from. ``limits``: instead of the agent's. ``model`` and ``model_settings``: instead of, and
    over, the agent's. ``on_event``: called (and awaited) with every event. ``parent``: the
    context of the run that this one is part of, inside a tool: its limits, deadline and
    cancellation hold here too, and what is used here counts there.
    """

    deps: DepsT
    message_history: History | Sequence[ModelRequest | ModelResponse] | None
    limits: UsageLimits | None
    model: Model | str | None
    model_settings: ModelSettings | None
    on_event: EventHandler | None
    parent: RunContext[Any] | None


class AgentOptions(TypedDict, Generic[DepsT], total=False):
    """Keywords of an agent besides its output type; see :class:`Agent`."""

    instructions: str | Sequence[str]
    deps_type: type[DepsT]
    name: str | None
    tools: Sequence[Tool[DepsT] | Callable[..., Any]]
    toolsets: Sequence[FunctionToolset[DepsT]]
    hooks: Sequence[Hooks[DepsT]]
    compaction: Compaction | None
    model_settings: ModelSettings | None
    retries: int
    output_retries: int | None
    tool_timeout: float | None
    limits: UsageLimits | None
