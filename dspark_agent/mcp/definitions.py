"""What a server says its tools are, checked: nothing of it is believed unseen."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import mcp

from dspark_agent.errors import MCPProtocolError, SchemaError
from dspark_agent.json_schema import JsonSchema
from dspark_agent.mcp.approvals import Definition

T = TypeVar("T")
MAX_PAGES = 100
"""Pages of one listing: a server that never ends its list cannot hold a client."""
MAX_DEFINITION_CHARS = 50_000
"""Of one tool's definition as JSON: the model reads all of it, in every conversation."""


@dataclass(frozen=True, slots=True)
class RemoteTool:
    """A tool as its server describes it. ``parameters`` is a JSON Schema of type object."""

    name: str
    description: str
    parameters: dict[str, Any]
    definition: Definition


async def read_pages(
    server: str, what: str, page: Callable[[str | None], Awaitable[tuple[list[T], str | None]]]
) -> list[T]:
    """All entries of a listing that comes in pages.

    Raises:
        MCPProtocolError: the pages do not end, or go round in a circle.
    """
    entries: list[T] = []
    cursor: str | None = None
    seen: set[str] = set()
    for _ in range(MAX_PAGES):
        more, cursor = await page(cursor)
        entries += more
        if cursor is None:
            return entries
        if cursor in seen:
            raise MCPProtocolError(server, f"{what} came to the page {cursor!r} a second time")
        seen.add(cursor)
    raise MCPProtocolError(server, f"{what} does not end after {MAX_PAGES} pages")


def checked_tools(server: str, tools: list[mcp.Tool]) -> dict[str, RemoteTool]:
    """The tools by name.

    Raises:
        MCPProtocolError: two have one name, or one has a schema that is none, or is huge.
    """
    checked: dict[str, RemoteTool] = {}
    for tool in tools:
        if tool.name in checked:
            raise MCPProtocolError(server, f"it lists two tools called {tool.name!r}")
        checked[tool.name] = _checked(server, tool)
    return checked


def exposed_name(server: str, name: str, prefix: str | None) -> str:
    """What the model calls the tool: the protocol's names may hold dots and slashes, which a tool
    call's name may not.

    Raises:
        MCPProtocolError: nothing of the name can be used.
    """
    exposed = re.sub(r"[^A-Za-z0-9_-]", "_", f"{prefix}_{name}" if prefix else name)
    if not exposed.replace("-", "_").isidentifier():
        raise MCPProtocolError(server, f"{name!r} is no name for a tool; give a prefix=...")
    return exposed


def _checked(server: str, tool: mcp.Tool) -> RemoteTool:
    definition = tool.model_dump(
        mode="json", by_alias=True, exclude_none=True, exclude={"icons", "meta"}
    )
    size = len(json.dumps(definition))
    if size > MAX_DEFINITION_CHARS:
        raise MCPProtocolError(
            server,
            f"tool {tool.name!r} is described in {size} characters, more than "
            f"{MAX_DEFINITION_CHARS}; a model cannot read that in every conversation",
        )
    try:
        JsonSchema(tool.input_schema)
    except SchemaError as error:
        raise MCPProtocolError(
            server, f"tool {tool.name!r}: its inputSchema is no JSON Schema: {error}"
        ) from error
    return RemoteTool(tool.name, tool.description or "", _narrow(tool.input_schema), definition)


def _narrow(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with what it does not name ruled out, unless it says otherwise: a model that
    makes up parameters helps nobody, and without them a grammar has fewer choices."""
    named = {key: value for key, value in schema.items() if key != "$schema"}
    named.setdefault("properties", {})
    if named.keys() <= {"type", "properties", "required", "title", "description", "$defs"}:
        named["additionalProperties"] = False
    return named
