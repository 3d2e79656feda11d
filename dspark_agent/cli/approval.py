"""Asking before a tool does something: the seam between a chat and the tools it may run.

A :data:`Confirm` is all that a front end has to bring: the chat brings one that asks at the
terminal. :func:`confirmed` puts it before every call of a tool.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Container, Mapping
from typing import Any

import anyio

from dspark_agent.context import RunContext
from dspark_agent.errors import ModelRetry, ToolFailed
from dspark_agent.messages import ToolCallPart
from dspark_agent.tools import Tool
from dspark_agent.toolset import FunctionToolset

Confirm = Callable[[ToolCallPart], Awaitable[str | None]]
"""Decides about one call: None lets it run, a text is why it must not."""


def confirmed(
    toolset: FunctionToolset, confirm: Confirm, *, free: Container[str] = ()
) -> FunctionToolset:
    """The toolset with every tool but those named in ``free`` asking ``confirm`` first."""
    return FunctionToolset(
        [
            tool if tool.name in free else ConfirmedTool(tool, confirm)
            for tool in toolset.tools.values()
        ],
        id=toolset.id,
    )


class ConfirmedTool(Tool[Any]):
    """A tool that asks first. Its time limit counts from the answer, and its calls wait for each
    other, so that one question is asked at a time."""

    def __init__(self, tool: Tool[Any], confirm: Confirm) -> None:
        self.__dict__.update(vars(tool))
        self._tool = tool
        self._confirm = confirm
        self.timeout = None
        self.sequential = True

    async def run(self, ctx: RunContext[Any], arguments: Mapping[str, Any]) -> Any:
        call = ToolCallPart(
            tool_name=self.name,
            args=dict(arguments),
            tool_call_id=ctx.tool_call_id or "",
        )
        reason = await self._confirm(call)
        if reason is not None:
            raise ToolFailed(f"not allowed: {reason}")
        with anyio.move_on_after(self._tool.timeout):
            return await self._tool.run(ctx, arguments)
        raise ModelRetry(f"{self.name} took longer than {self._tool.timeout:g} s and was stopped.")
