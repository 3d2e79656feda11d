"""A server's tools and resources as tools of an agent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mcp_types as types

from dspark_agent.errors import (
    MCPConnectionError,
    MCPError,
    MCPOutputTooLarge,
    ModelRetry,
    ToolFailed,
)
from dspark_agent.mcp.approvals import digest
from dspark_agent.mcp.definitions import RemoteTool, exposed_name
from dspark_agent.mcp.resources import MCPResource
from dspark_agent.tools import Tool

if TYPE_CHECKING:
    from dspark_agent.mcp.server import MCPServer


def offered_tool(server: MCPServer, remote: RemoteTool, prefix: str | None) -> Tool[Any]:
    """One of the server's tools. What the model can do something about is told to the model; a
    server that lies, cannot be reached again or has changed the tool ends the run."""
    sha256 = digest(remote.definition)

    async def call(**arguments: Any) -> Any:
        try:
            return await server.call_unchanged(remote.name, arguments, sha256)
        except MCPOutputTooLarge as error:
            raise ToolFailed(str(error)) from error
        except MCPConnectionError as error:
            await server.reopen()  # the model's next call needs it; if it fails, this is the end
            raise ToolFailed(str(error)) from error
        except MCPError as error:
            if error.code == types.INVALID_PARAMS:
                raise ModelRetry(str(error)) from error
            raise

    return Tool(
        call,
        name=exposed_name(server.name, remote.name, prefix),
        description=remote.description,
        parameters=remote.parameters,
        timeout=server.timeout,
    )


def resource_tools(server: MCPServer, prefix: str | None) -> list[Tool[Any]]:
    """Tools with which the model looks for resources itself, and reads them."""

    async def list_resources() -> list[MCPResource]:
        """List what can be read, with the uri of each."""
        return await server.list_resources()

    async def read_resource(uri: str) -> str:
        """Read a resource.

        Args:
            uri: The uri, as list_resources gives it, with any {names} in it filled in.
        """
        try:
            return await server.read_resource(uri)
        except MCPOutputTooLarge as error:
            raise ToolFailed(str(error)) from error
        except MCPError as error:
            if error.code is None:
                raise  # not the server's refusal, but the end of the connection
            raise ToolFailed(str(error)) from error

    return [
        Tool(function, name=exposed_name(server.name, function.__name__, prefix))
        for function in (list_resources, read_resource)
    ]
