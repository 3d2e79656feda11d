"""Conversations that come out of others: forks, forks in the middle of a step, and successors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dspark_agent.account import Work
from dspark_agent.asking import instructions
from dspark_agent.context import DepsT, RunContext
from dspark_agent.conversation import Conversation
from dspark_agent.history import History
from dspark_agent.messages import SystemPromptPart

if TYPE_CHECKING:
    from dspark_agent.core import Core


async def fork(core: Core[DepsT], *, shares_limits: bool = False) -> Core[DepsT]:
    """An independent copy of the conversation, which shares the model's work so far; with
    ``shares_limits``, what it uses counts there, under the limits that are in force there."""
    with core.exclusive():
        model_session = await core.model_session.fork()
    if shares_limits:
        child = core.sibling(core.context(core.account.whole))
        child.start(model_session, core.conversation.copy(), None)
    else:
        child = core.sibling(core.account.parent)
        child.start(model_session, core.conversation.copy(), core.limits)
    return child


async def branch(
    core: Core[DepsT], ctx: RunContext[DepsT], before: Conversation, model_mark: object
) -> Core[DepsT]:
    """A fork in the middle of a step: the conversation as it was before, as part of ``ctx``."""
    model_session = await core.model_session.fork()
    await model_session.rollback(model_mark)
    child = core.sibling(ctx)
    child.start(model_session, before.copy(), None)
    return child


async def take_over(core: Core[Any], other: Core[Any], work: Work, output_type: Any) -> None:
    """Let ``core`` go on with the conversation of another agent, under its own instructions: in the
    same account and journal, told to both agents' observers."""
    before = other.conversation
    core.account = other.account
    core.record = other.record
    core.watch = other.watch.handed_over(core.watch)
    core.conversation = Conversation(
        steps=list(before.steps), compactions=list(before.compactions), told=before.told
    )
    first, *rest = before.messages
    said = [part for part in first.parts if not isinstance(part, SystemPromptPart)]
    parts = (*await instructions(core, work), *said)
    begin = [first.model_copy(update={"parts": parts})] if parts else []
    messages = (*begin, *rest)
    await core.open(History(messages=messages), output_type, core.conversation)
    gone = len(before.messages) - len(messages)
    core.conversation.run_begin = max(0, before.run_begin - gone)
