"""The tools of one server: as they were listed, chosen and approved."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import mcp
import mcp_types as types
from mcp.client.subscriptions import SubscriptionLost
from mcp_types.version import MODERN_PROTOCOL_VERSIONS

from dspark_agent.errors import MCPToolChangedError, UserError
from dspark_agent.mcp.approvals import ToolApprovals, ToolChange, digest
from dspark_agent.mcp.definitions import RemoteTool, checked_tools, read_pages

ApproveHook = Callable[[ToolChange], Awaitable[bool] | bool]
"""Whether a tool that is new, or changed since it was approved, may be used."""
Choice = Sequence[str] | Callable[[str], bool] | None


class ToolCatalogue:
    """What the server lists now, and what of it may be used.

    ``stale`` is set when the server says that its list has changed.
    """

    def __init__(self, server: str, approvals: ToolApprovals, approve: ApproveHook | None) -> None:
        self.server = server
        self.listed: dict[str, RemoteTool] = {}
        self.stale = False
        self._approvals = approvals
        self._approve = approve

    async def read(self, client: mcp.Client) -> None:
        """List the server's tools.

        Raises:
            MCPProtocolError: the list is not one that can be used.
        """

        async def page(cursor: str | None) -> tuple[list[mcp.Tool], str | None]:
            result = await client.list_tools(cursor=cursor)
            return result.tools, result.next_cursor

        self.stale = False
        tools: list[mcp.Tool] = []
        if client.server_capabilities.tools is not None:
            tools = await read_pages(self.server, "tools/list", page)
        self.listed = checked_tools(self.server, tools)

    async def on_message(self, message: object) -> None:
        """Hear what servers of the older protocols send unasked."""
        if isinstance(message, types.ToolListChangedNotification):
            self.stale = True

    async def watch(self, client: mcp.Client) -> None:
        """Hear it from a server of the newer protocols, which must be asked to tell."""
        tools = client.server_capabilities.tools
        modern = client.protocol_version in MODERN_PROTOCOL_VERSIONS
        if not modern or tools is None or not tools.list_changed:
            return
        try:
            async with client.listen(tools_list_changed=True) as events:
                async for _ in events:
                    self.stale = True
        except (mcp.MCPError, SubscriptionLost, TimeoutError):
            self.stale = True  # nobody knows what was missed: read again before the next call

    def choose(self, include: Choice, exclude: Sequence[str]) -> list[RemoteTool]:
        """The listed tools that are included and not excluded, in the server's order.

        Raises:
            UserError: there is no tool of a given name.
        """
        given = [] if include is None or callable(include) else list(include)
        for name in (*given, *exclude):
            if name not in self.listed:
                there_are = ", ".join(self.listed) or "none"
                raise UserError(
                    f"MCP server {self.server!r} has no tool {name!r}; it has: {there_are}"
                )
        wanted = include if callable(include) else given.__contains__
        return [
            tool
            for name, tool in self.listed.items()
            if name not in exclude and (include is None or wanted(name))
        ]

    async def approved(self, tool: RemoteTool) -> bool:
        """Whether the tool may be used as it is described now.

        Raises:
            MCPToolChangedError: it was approved in other words, and nobody is there to ask.
        """
        before = self._approvals.approved(self.server, tool.name)
        if before is not None and digest(before) == digest(tool.definition):
            return True
        change = ToolChange(self.server, tool.name, before, tool.definition)
        if self._approve is not None:
            answer: Any = self._approve(change)
            if not (await answer if inspect.isawaitable(answer) else answer):
                return False
        elif before is not None:
            raise MCPToolChangedError(
                self.server,
                f"the definition of tool {tool.name!r} has changed since it was approved; look at "
                f"it, then approve it with approve=..., or forget() the old one:\n{change}",
            )
        self._approvals.approve(self.server, tool.name, tool.definition)
        return True

    def check_unchanged(self, name: str, sha256: str) -> None:
        """Raise :class:`MCPToolChangedError` unless the tool is listed as it was."""
        tool = self.listed.get(name)
        if tool is None:
            raise MCPToolChangedError(self.server, f"tool {name!r} is gone")
        if digest(tool.definition) != sha256:
            raise MCPToolChangedError(
                self.server,
                f"the definition of tool {name!r} has changed while it was in use; look at it, "
                "then make a new toolset()",
            )
