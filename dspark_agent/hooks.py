"""Places in a run where a user's code looks on, changes what is asked for, or steps in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic

from dspark_agent.context import DepsT_contra, RunContext
from dspark_agent.errors import UserError
from dspark_agent.messages import ModelResponse, RetryPromptPart, ToolCallPart, ToolReturnPart
from dspark_agent.models.base import ModelTurn


class Hooks(Generic[DepsT_contra]):
    """Called around every model turn and every tool call; override what you need.

    ``Agent(hooks=[A(), B()])``: of several, the first is the outermost: its ``before_`` hooks run
    first and its ``after_`` hooks last. Whatever a hook raises ends the run and comes out as it is,
    the step being undone; in the two around a tool, ModelRetry and ToolFailed are said to the model
    instead, and ``before_tool`` may raise ApprovalRequired, which pauses the run. Output tools are
    no tools here: see :meth:`Agent.output_guard`.
    """

    async def before_model(
        self, ctx: RunContext[DepsT_contra], turn: ModelTurn
    ) -> ModelTurn | None:
        """Before the model writes: ``turn`` is what it may emit, ``ctx.messages`` what was said.

        Gives another turn (fewer tools, other settings) to ask for that one; None leaves it.
        """

    async def after_model(self, ctx: RunContext[DepsT_contra], response: ModelResponse) -> None:
        """After the model has written, before its calls are run or its output is checked."""

    async def before_tool(
        self, ctx: RunContext[DepsT_contra], call: ToolCallPart
    ) -> ToolCallPart | None:
        """Before a call is checked and run. Gives the call with other ``args`` to run that one
        (the conversation keeps what the model wrote); None leaves it."""

    async def after_tool(
        self,
        ctx: RunContext[DepsT_contra],
        call: ToolCallPart,
        result: ToolReturnPart | RetryPromptPart,
    ) -> ToolReturnPart | RetryPromptPart | None:
        """After a call was run or refused. Gives the result that the model reads instead; None
        leaves it."""


async def before_model(
    hooks: Sequence[Hooks[Any]], ctx: RunContext[Any], turn: ModelTurn
) -> ModelTurn:
    """The turn as the hooks leave it."""
    for hook in hooks:
        changed = await hook.before_model(ctx, turn)
        turn = turn if changed is None else _checked(hook, "before_model", changed, ModelTurn)
    return turn


async def after_model(
    hooks: Sequence[Hooks[Any]], ctx: RunContext[Any], response: ModelResponse
) -> None:
    """Show the hooks what the model wrote."""
    for hook in reversed(hooks):
        await hook.after_model(ctx, response)


async def before_tool(
    hooks: Sequence[Hooks[Any]], ctx: RunContext[Any], call: ToolCallPart
) -> ToolCallPart:
    """The call to run."""
    for hook in hooks:
        changed = await hook.before_tool(ctx, call)
        if changed is None:
            continue
        found = _checked(hook, "before_tool", changed, ToolCallPart)
        if (found.tool_name, found.tool_call_id) != (call.tool_name, call.tool_call_id):
            raise UserError(
                f"{type(hook).__name__}.before_tool turned {call.tool_name!r} into another call: "
                "it may change args only, as in call.model_copy(update={'args': ...})"
            )
        call = found
    return call


async def after_tool(
    hooks: Sequence[Hooks[Any]],
    ctx: RunContext[Any],
    call: ToolCallPart,
    result: ToolReturnPart | RetryPromptPart,
) -> ToolReturnPart | RetryPromptPart:
    """The result that the model reads."""
    for hook in reversed(hooks):
        changed = await hook.after_tool(ctx, call, result)
        if changed is None:
            continue
        result = _checked(hook, "after_tool", changed, ToolReturnPart, RetryPromptPart)
        own = {"tool_name": call.tool_name, "tool_call_id": call.tool_call_id}
        result = result.model_copy(update=own)
    return result


def _checked(hook: Hooks[Any], name: str, value: Any, *kinds: type) -> Any:
    if isinstance(value, kinds):
        return value
    wanted = " or ".join(kind.__name__ for kind in kinds)
    raise UserError(f"{type(hook).__name__}.{name} returned {value!r}: give {wanted}, or None")
