"""What a tool or a resource of a server holds, as a tool's result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, assert_never

import mcp_types as types

from dspark_agent.errors import MCPOutputTooLarge
from dspark_agent.messages import content_text


def result_value(result: types.CallToolResult) -> Any:
    """The structured content where there is some, else the texts together."""
    if result.structured_content is not None and not result.is_error:
        return result.structured_content
    return "\n".join(block_text(block) for block in result.content)


def block_text(block: types.ContentBlock) -> str:
    """A block as text; of what is no text, what and how much it is."""
    match block:
        case types.TextContent():
            return block.text
        case types.ImageContent() | types.AudioContent():
            return f"[{block.type} of type {block.mime_type}, {_bytes(block.data)} bytes]"
        case types.ResourceLink():
            return f"[resource {block.uri}: {block.name}]"
        case types.EmbeddedResource():
            return contents_text([block.resource])
        case _:
            assert_never(block)


def contents_text(
    contents: Sequence[types.TextResourceContents | types.BlobResourceContents],
) -> str:
    """The texts of a resource together; of what is no text, what and how much it is."""
    return "\n".join(
        part.text
        if isinstance(part, types.TextResourceContents)
        else f"[{part.uri}: {part.mime_type or 'data'}, {_bytes(part.blob)} bytes]"
        for part in contents
    )


def check_size(server: str, what: str, value: Any, limit: int) -> None:
    """Raise :class:`MCPOutputTooLarge` where the model would read more than ``limit`` characters
    of ``value``."""
    size = len(content_text(value))
    if size > limit:
        raise MCPOutputTooLarge(
            server,
            f"{what} gave {size} characters, more than max_output_chars={limit}; ask for less",
        )


def _bytes(base64: str) -> int:
    return len(base64.rstrip("=")) * 3 // 4
