"""Tools, resources and requests of MCP servers, with the official ``mcp`` package.

Needs the extra: ``pip install -c constraints.txt -e '.[mcp]'``.
"""

from __future__ import annotations

try:
    import mcp as _mcp  # noqa: F401 - to say what is missing, and how to get it
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "dspark_agent.mcp needs the `mcp` package; install it with the extra: "
        "pip install -c constraints.txt -e '.[mcp]'"
    ) from error

from dspark_agent.errors import (
    MCPConnectionError,
    MCPError,
    MCPOutputTooLarge,
    MCPProtocolError,
    MCPToolChangedError,
)
from dspark_agent.mcp.approvals import ToolApprovals, ToolChange
from dspark_agent.mcp.callbacks import Elicitation, Sampling
from dspark_agent.mcp.http import MCPServerHTTP
from dspark_agent.mcp.resources import MCPResource
from dspark_agent.mcp.server import MCPServer
from dspark_agent.mcp.stdio import MCPServerStdio

__all__ = [
    "Elicitation",
    "MCPConnectionError",
    "MCPError",
    "MCPOutputTooLarge",
    "MCPProtocolError",
    "MCPResource",
    "MCPServer",
    "MCPServerHTTP",
    "MCPServerStdio",
    "MCPToolChangedError",
    "Sampling",
    "ToolApprovals",
    "ToolChange",
]
