"""Keywords that all ways to run an agent have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypedDict

from dspark_agent.context import DepsT, RunContext
from dspark_agent.deferred import DeferredToolResults
from dspark_agent.history import History
from dspark_agent.journal.base import Journal
from dspark_agent.limits import UsageLimits
from dspark_agent.messages import ModelRequest, ModelResponse
from dspark_agent.models.base import Model
from dspark_agent.relay import EventHandler
from dspark_agent.settings import ModelSettings


class ResumeOptions(TypedDict, Generic[DepsT], total=False):
    """Keywords of :meth:`Agent.resume`.

    ``deps``: what tools find in ``ctx.deps``. ``limits``: instead of the agent's. ``model`` and
    ``model_settings``: instead of, and over, the agent's. ``on_event``: called (and awaited) with
    every event. ``deferred_tool_results``: decisions about the calls that the message history or
    the journal left waiting. ``parent``: the context of the run that this one is part of, inside a
    tool: its limits, deadline and cancellation hold here too, and what is used here counts there.
    """

    deps: DepsT
    limits: UsageLimits | None
    model: Model | str | None
    model_settings: ModelSettings | None
    on_event: EventHandler | None
    deferred_tool_results: DeferredToolResults | None
    parent: RunContext[Any] | None


class RunOptions(ResumeOptions[DepsT], total=False):
    """Keywords of every way to run an agent: those of :class:`ResumeOptions`, and these.

    ``message_history``: messages or a History to go on from. ``journal`` and ``run_id``: where,
    and under which name, the run is recorded; a run that is there already goes on from what is
    recorded, see :meth:`Agent.resume`.
    """

    message_history: History | Sequence[ModelRequest | ModelResponse] | None
    journal: Journal | None
    run_id: str | None
