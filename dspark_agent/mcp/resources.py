"""Resources of a server: what there is to read."""

from __future__ import annotations

from dataclasses import dataclass

import mcp
import mcp_types as types

from dspark_agent.mcp.definitions import read_pages


@dataclass(frozen=True, slots=True)
class MCPResource:
    """Something a server lets its clients read. ``size_bytes`` where the server says it.

    ``is_template``: ``uri`` holds ``{names}`` to be filled in.
    """

    uri: str
    name: str
    description: str = ""
    mime_type: str | None = None
    size_bytes: int | None = None
    is_template: bool = False


async def read_resources(server: str, client: mcp.Client) -> list[MCPResource]:
    """List a server's resources, then its templates.

    Raises:
        MCPProtocolError: a list does not end.
    """
    if client.server_capabilities.resources is None:
        return []

    async def page(cursor: str | None) -> tuple[list[types.Resource], str | None]:
        result = await client.list_resources(cursor=cursor)
        return result.resources, result.next_cursor

    async def template_page(
        cursor: str | None,
    ) -> tuple[list[types.ResourceTemplate], str | None]:
        result = await client.list_resource_templates(cursor=cursor)
        return result.resource_templates, result.next_cursor

    plain = await read_pages(server, "resources/list", page)
    templates = await read_pages(server, "resources/templates/list", template_page)
    return [*map(_resource, plain), *map(_template, templates)]


def _resource(found: types.Resource) -> MCPResource:
    return MCPResource(
        uri=found.uri,
        name=found.name,
        description=found.description or "",
        mime_type=found.mime_type,
        size_bytes=found.size,
    )


def _template(found: types.ResourceTemplate) -> MCPResource:
    return MCPResource(
        uri=found.uri_template,
        name=found.name,
        description=found.description or "",
        mime_type=found.mime_type,
        is_template=True,
    )
