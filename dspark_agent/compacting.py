"""Shortening a running conversation: a summary, a new model session, and a record of it."""

from __future__ import annotations

import inspect
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dspark_agent import budget
from dspark_agent.compaction import (
    Compaction,
    Messages,
    first_kept,
    new_index,
    shortened,
    summary_request,
)
from dspark_agent.errors import ContextLengthError, UnexpectedModelBehavior, UserError
from dspark_agent.events import CompactionReason, ContextCompacted
from dspark_agent.journal.entries import Compacted
from dspark_agent.journal.session import RecordedSession
from dspark_agent.limits import RequestUsage
from dspark_agent.messages import ModelResponse, UserPromptPart
from dspark_agent.models.base import ModelEvent, ModelSession, ModelTurn
from dspark_agent.relay import EventRelay
from dspark_agent.settings import ModelSettings

if TYPE_CHECKING:
    from dspark_agent.account import Work
    from dspark_agent.core import Core


@dataclass(frozen=True, slots=True)
class _Summary:
    """A summary of the messages before index ``kept``."""

    text: str
    kept: int
    usage: RequestUsage


async def make_room(core: Core[Any], work: Work, policy: Compaction) -> None:
    """Shorten the conversation where the next step is to begin with less, or where the journal says
    that it was shortened before that step."""
    while (known := _known(core)) is not None:
        await compact(core, work, policy, known.reason)
    session = core.model_session
    if isinstance(session, RecordedSession):
        if session.is_recorded:
            return
        await session.live()  # which alone knows its window
    if policy.is_due(core.conversation.context_tokens, session.context_window):
        await compact(core, work, policy, CompactionReason.SHARE)


async def compact(
    core: Core[Any], work: Work, policy: Compaction, reason: CompactionReason
) -> bool:
    """Shorten the conversation between two steps; False where there is nothing to leave out.

    The conversation is as it was when this raises, but for an error of the event's listener.

    Raises:
        UsageLimitExceeded: no request is left for the summary.
        UnexpectedModelBehavior: the model wrote no summary.
        ModelError: the model failed, or has no room left for a summary (ContextLengthError).
    """
    began = time.perf_counter()
    before = core.conversation
    messages = tuple(before.messages)
    kept = first_kept(messages, policy.keep_turns)
    if kept is None:
        return False
    known = _known(core)
    if known is not None:
        summary = _Summary(known.summary, known.kept, known.usage)
        if policy.summarise is None:
            core.usage.count_request()
            core.usage.count_tokens(known.usage)
    elif policy.summarise is None:
        summary = await _written(core, work, policy, messages, kept)
    else:
        text = await _given(policy, messages[:kept])
        summary = _Summary(text, kept, RequestUsage())
    kept = summary.kept
    record = ContextCompacted(
        step=len(before.steps),
        reason=reason,
        context_tokens=before.context_tokens,
        summary=summary.text,
        left_out=messages[:kept],
        usage=summary.usage,
        seconds=time.perf_counter() - began,
    )
    after = replace(
        before.copy(),
        messages=shortened(messages, kept, summary.text),
        sent=0,
        told=before.told & _prompts(messages[kept:]),
        context_tokens=0,
        compactions=[*before.compactions, record],
        run_begin=new_index(messages, kept, before.run_begin),
    )
    if core.record is not None and known is None:
        await core.record.write(
            Compacted(
                number=len(before.compactions),
                step=record.step,
                reason=reason,
                kept=kept,
                summary=summary.text,
                usage=summary.usage,
            )
        )
    await core.reopen(after)
    await EventRelay(core.on_event, record.step, core.declaration.output).send(record)
    return True


def _known(core: Core[Any]) -> Compacted | None:
    """What the journal has of a compaction that comes next, before the step that comes next."""
    if core.record is None:
        return None
    known = core.record.find(Compacted, len(core.conversation.compactions))
    return known if known is not None and known.step == len(core.conversation.steps) else None


async def _written(
    core: Core[Any], work: Work, policy: Compaction, messages: Messages, kept: int
) -> _Summary:
    """A summary by the model: on a fork, where what it has read is not computed again; where that
    has no room left, in a new session of the left-out messages, fewer each time."""
    with suppress(ContextLengthError):
        request = summary_request(messages, core.conversation.sent, kept)
        return await _asked(core, work, policy, await core.model_session.fork(), request, kept)
    while True:
        request = summary_request(messages[:kept], 0, kept)
        try:
            session = await core.model.open(core.widest)
            return await _asked(core, work, policy, session, request, kept)
        except ContextLengthError:
            half = sum(isinstance(message, ModelResponse) for message in messages[:kept]) // 2
            fewer = first_kept(messages[:kept], half)
            if fewer is None:
                raise
            kept = fewer


async def _asked(
    core: Core[Any],
    work: Work,
    policy: Compaction,
    session: ModelSession,
    request: Messages,
    kept: int,
) -> _Summary:
    """Ask in a session of its own, which is closed after."""
    try:
        budget.check_request(work.budgets)
        left = budget.output_tokens_left(work.budgets)
        tokens = policy.summary_tokens if left is None else min(left, policy.summary_tokens)
        turn = ModelTurn(tool_choice="none", settings=ModelSettings(max_tokens=tokens))
        with core.usage.request():
            response = await session.step(request, turn, _unheard)
    finally:
        await core.closed(session)
    core.usage.count_tokens(response.usage)
    text = response.text.strip()
    if not text:
        raise UnexpectedModelBehavior(
            "the context is full, and the model wrote no summary to go on from; give "
            "Compaction(summarise=...)"
        )
    return _Summary(text, kept, response.usage)


def _prompts(messages: Messages) -> frozenset[str]:
    parts = [part for message in messages for part in message.parts]
    return frozenset(part.content for part in parts if isinstance(part, UserPromptPart))


async def _given(policy: Compaction, left_out: Messages) -> str:
    assert policy.summarise is not None
    summary = policy.summarise(left_out)
    if inspect.isawaitable(summary):
        summary = await summary
    if not isinstance(summary, str):
        raise UserError(f"Compaction: summarise returned {summary!r}, not a text")
    return summary


async def _unheard(event: ModelEvent) -> None:
    """The summary comes whole, in the record."""
