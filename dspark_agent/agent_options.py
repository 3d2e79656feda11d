"""The keywords of an agent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypedDict

from dspark_agent.compaction import Compaction
from dspark_agent.context import DepsT
from dspark_agent.hooks import Hooks
from dspark_agent.limits import UsageLimits
from dspark_agent.settings import ModelSettings
from dspark_agent.tools import Tool
from dspark_agent.toolset import FunctionToolset


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
