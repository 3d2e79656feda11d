"""Conversations that go on from another's: a fork in the middle of a step, and a successor."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dspark_agent.context import DepsT, RunContext
from dspark_agent.conversation import Conversation
from dspark_agent.history import History
from dspark_agent.messages import SystemPromptPart

if TYPE_CHECKING:
    from dspark_agent.core import Core, Work


async def branched(
    core: Core[DepsT], ctx: RunContext[DepsT], before: Conversation, model_mark: object
) -> Core[DepsT]:
    """A fork in the middle of a step: the conversation as it was before, as part of ``ctx``."""
    model_session = await core.model_session.fork_at(model_mark)
    child = core.sibling(ctx)
    child.start(model_session, before.copy(), None)
    return child


async def take_over(core: Core[Any], other: Core[Any], work: Work, output_type: Any) -> None:
    """Open ``core`` with the conversation of another agent, under its own instructions; it counts
    in that conversation's account. ``output_type`` as for :meth:`Core.open`."""
    core.usage = other.usage
    first, *rest = other.conversation.messages
    said = [part for part in first.parts if not isinstance(part, SystemPromptPart)]
    system = await core.instructions(work)
    parts = (*([SystemPromptPart(content=system)] if system else []), *said)
    begin = [first.model_copy(update={"parts": parts})] if parts else []
    await core.open(History(messages=(*begin, *rest)), output_type)
    gone = len(other.conversation.messages) - len(core.conversation.messages)
    core.conversation.run_begin = max(0, other.conversation.run_begin - gone)
    watch, own = other.watch, core.watch.own
    observers = (*watch.own, *(observer for observer in own if observer not in watch.own))
    core.watch = replace(core.watch, conversation_id=watch.conversation_id, own=observers)
    core.conversation.steps = list(other.conversation.steps)
    core.conversation.compactions = list(other.conversation.compactions)
