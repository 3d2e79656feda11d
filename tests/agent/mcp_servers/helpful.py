"""A well-behaved server, made with the mcp package.

``helpful.py stdio`` or ``helpful.py http PORT``.
Tools that wait write to the files they are given, so that a test sees from outside what goes on.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Annotated, Any

import anyio
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.mcpserver.resolve import Elicit, Resolve, Sample
from mcp_types import CreateMessageResult, ImageContent, SamplingMessage, TextContent
from pydantic import BaseModel

server = MCPServer("helpful", log_level="ERROR")


class Size(BaseModel):
    size: int


@server.tool()
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@server.tool(name="files.search/all")
def search(text: str, limit: int = 10) -> list[str]:
    """Search all files."""
    return [f"{text}{n}" for n in range(limit)]


@server.tool()
def fail(why: str) -> str:
    """Fail."""
    raise ToolError(why)


@server.tool(structured_output=False)
def write(characters: int) -> str:
    """Write a lot."""
    return "x" * characters


@server.tool(structured_output=False)
def picture() -> list[Any]:
    """A picture and a caption."""
    return [
        TextContent(type="text", text="a dot"),
        ImageContent(type="image", data="QUJD", mime_type="image/png"),
    ]


@server.tool()
async def wait(log: str, seconds: float) -> str:
    """Wait."""
    path = Path(log)
    path.write_text("begun")
    try:
        await anyio.sleep(seconds)
    except BaseException:
        path.write_text("cancelled")
        raise
    path.write_text("done")
    return "done"


def weather(city: str) -> str:
    """The weather in a city."""
    return f"sun in {city}"


server.add_tool(weather, name="weather")
versions = itertools.count(2)


@server.tool()
async def rewrite(ctx: Context[Any, Any]) -> str:
    """Change what the weather tool says it does."""
    server.remove_tool("weather")
    server.add_tool(weather, name="weather", description=f"The weather, version {next(versions)}.")
    await ctx.notify_tools_changed()
    return "rewritten"


def haiku_request(topic: str) -> Sample:
    message = SamplingMessage(role="user", content=TextContent(type="text", text=f"Haiku: {topic}"))
    return Sample([message], max_tokens=64, system_prompt="You are a poet.", temperature=0.5)


@server.tool(structured_output=False)
def haiku(topic: str, poem: Annotated[CreateMessageResult, Resolve(haiku_request)]) -> str:
    """Let the client's model write."""
    assert isinstance(poem.content, TextContent)
    return f"{poem.model}: {poem.content.text} ({poem.stop_reason})"


def size_request(item: str) -> Elicit[Size]:
    return Elicit(f"Which size of {item}?", Size)


@server.tool(structured_output=False)
def order(item: str, size: Annotated[Size, Resolve(size_request)]) -> str:
    """Ask the user for a size."""
    return f"{item} of size {size.size}"


@server.resource("notes://today", name="today", description="The notes of today.")
def notes() -> str:
    return "Buy milk."


@server.resource("notes://picture", name="picture", mime_type="image/png")
def picture_resource() -> bytes:
    return b"ABC"


@server.resource("notes://day/{day}", name="day")
def notes_of(day: str) -> str:
    return f"Notes of {day}."


if __name__ == "__main__":
    if sys.argv[1] == "stdio":
        server.run("stdio")
    else:
        server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[2]))
