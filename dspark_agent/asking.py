"""What a model is told before its turn: instructions, a prompt, the form of the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dspark_agent.account import Work
from dspark_agent.calling import call_with_ctx
from dspark_agent.conversation import Conversation
from dspark_agent.errors import UserError
from dspark_agent.guards import check_guards
from dspark_agent.journal.entries import Instructions
from dspark_agent.messages import SystemPromptPart, UserPromptPart
from dspark_agent.step import StepPlan

if TYPE_CHECKING:
    from dspark_agent.core import Core


async def ask(core: Core[Any], prompt: str | None, work: Work) -> None:
    """Add the instructions (before anything was said) and ``prompt`` to the conversation.

    Raises:
        UserError: there is nothing the model has to answer.
        GuardrailTripped: an input guard stops the run.
    """
    conversation = core.conversation
    if conversation.has_open_calls:
        raise UserError(
            "the history ends with tool calls that have no results; decide about them with "
            "deferred_tool_results=..., add their ToolReturnParts, or leave the last response out"
        )
    if not conversation.messages:
        conversation.ask(*await instructions(core, work))
    if prompt is not None:
        await check_guards(core.declaration.input_guards, core.context(work), prompt, place="input")
        conversation.ask(UserPromptPart(content=prompt))
    elif not conversation.has_news:
        raise UserError("nothing to answer: the model had the last word; give a prompt")


async def instructions(core: Core[Any], work: Work) -> list[SystemPromptPart]:
    """The agent's instructions as they are now, or as the run's journal has them: one part, or
    none."""
    step = len(core.conversation.steps)
    known = None if core.record is None else core.record.find(Instructions, step)
    if known is not None:
        text = known.text
    else:
        texts = [
            text if isinstance(text, str) else await call_with_ctx(text, core.context(work))
            for text in core.declaration.instructions
        ]
        text = "\n\n".join(text for text in texts if text)
        if core.record is not None:
            await core.record.write(Instructions(step=step, text=text))
    return [SystemPromptPart(content=text)] if text else []


def say_format(conversation: Conversation, plan: StepPlan) -> None:
    """What a PromptedOutput has to say, once a conversation."""
    prompt = plan.output.prompt
    if prompt is None or plan.needs_call or prompt in conversation.told:
        return
    conversation.told |= {prompt}
    conversation.ask(UserPromptPart(content=prompt))
