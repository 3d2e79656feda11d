"""An MCP server as agents use it: a set of tools, and resources to read."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Self, TypedDict, TypeVar

import anyio
import anyio.abc
import mcp
import mcp_types as types

from dspark_agent.errors import MCPConnectionError, ToolFailed, UserError
from dspark_agent.mcp.approvals import ToolApprovals
from dspark_agent.mcp.callbacks import ElicitationHook, Hooks, Sampling
from dspark_agent.mcp.catalogue import ApproveHook, Choice, ToolCatalogue
from dspark_agent.mcp.connection import Connection
from dspark_agent.mcp.content import check_size, contents_text, result_value
from dspark_agent.mcp.offer import offered_tool, resource_tools
from dspark_agent.mcp.resources import MCPResource, read_resources
from dspark_agent.toolset import FunctionToolset

T = TypeVar("T")


class ServerOptions(TypedDict, total=False):
    """Keywords of every server.

    ``name``: in errors and approvals. ``connect_timeout``: seconds to start it and read its tools
    (30). ``timeout``: seconds one request may take, a tool call with all that it waits for (60).
    ``max_output_chars``: of one result (50,000). ``approvals``: where approved definitions are
    kept; in memory by default. ``approve``: asked about tools that are new or have changed;
    without it, new ones are taken and changed ones refused. ``sampling``: lets the server have a
    model write. ``elicitation``: asked what the server wants to know from the user.
    """

    name: str | None
    connect_timeout: float
    timeout: float
    max_output_chars: int
    approvals: ToolApprovals | None
    approve: ApproveHook | None
    sampling: Sampling | None
    elicitation: ElicitationHook | None


class ClientOptions(TypedDict, total=False):
    """What every client of the ``mcp`` package is made with."""

    cache: None
    client_info: mcp.Implementation
    message_handler: Any
    sampling_callback: Any
    elicitation_callback: Any


class MCPServer(ABC):
    """A connection to an MCP server, open inside ``async with``.

    A lost connection is opened again at the next request, and the tools are read and compared
    again. Calls may come from many tasks at once; a cancelled one is cancelled on the server too.
    """

    def __init__(
        self,
        *,
        default_name: str,
        name: str | None = None,
        connect_timeout: float = 30.0,
        timeout: float = 60.0,
        max_output_chars: int = 50_000,
        approvals: ToolApprovals | None = None,
        approve: ApproveHook | None = None,
        sampling: Sampling | None = None,
        elicitation: ElicitationHook | None = None,
    ) -> None:
        self.name = name or default_name
        self.timeout = timeout
        self._connect_timeout = connect_timeout
        self._max_output_chars = max_output_chars
        self._hooks = Hooks(self.name, sampling, elicitation)
        kept = ToolApprovals() if approvals is None else approvals
        self._catalogue = ToolCatalogue(self.name, kept, approve)
        self._connection: Connection | None = None
        self._group: anyio.abc.TaskGroup | None = None

    @abstractmethod
    def _make_client(self, lost: anyio.Event, options: ClientOptions) -> mcp.Client:
        """A client that is not open yet, and sets ``lost`` when it finds its server gone."""

    def _begin(self) -> None:  # noqa: B027 - most need nothing
        """Get what clients need while the server is open."""

    def _end(self) -> None:  # noqa: B027
        """Let go of it."""

    def _last_words(self) -> str:
        """What the server said before it went, for errors."""
        return ""

    # -- open and close ------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        if self._group is not None:
            raise UserError(f"MCP server {self.name!r} is open already")
        connection = Connection(
            self.name,
            partial(self._make_client, options=self._client_options()),
            connect_timeout=self._connect_timeout,
            on_open=self._catalogue.read,
            watch=self._catalogue.watch,
            describe=self._last_words,
        )
        self._begin()
        group = anyio.create_task_group()
        await group.__aenter__()
        try:
            group.start_soon(connection.hold)
            await connection.client()
        except BaseException:
            await self._ended(group, connection)
            raise
        self._group, self._connection = group, connection
        return self

    async def __aexit__(self, *exc_info: Any) -> None:
        group, connection = self._group, self._connection
        self._group = self._connection = None
        if group is not None and connection is not None:
            await self._ended(group, connection)

    async def _ended(self, group: anyio.abc.TaskGroup, connection: Connection) -> None:
        """Close the connection and wait for the task that holds it."""
        connection.close()
        try:
            await group.__aexit__(None, None, None)
        finally:
            self._end()

    def _client_options(self) -> ClientOptions:
        options: ClientOptions = {
            "cache": None,  # the catalogue keeps what was listed, with its approval
            "client_info": mcp.Implementation(name="dspark-agent", version="0.1.0"),
            "message_handler": self._catalogue.on_message,
        }
        if self._hooks.sampling is not None:
            options["sampling_callback"] = self._hooks.sample
        if self._hooks.elicitation is not None:
            options["elicitation_callback"] = self._hooks.elicit
        return options

    async def _opened(self) -> Connection:
        if self._connection is None:
            raise MCPConnectionError(self.name, "it is not open; use it inside `async with`")
        await self._connection.client()
        return self._connection

    async def _request(
        self, what: str, send: Callable[[mcp.Client], Awaitable[T]], timeout: float | None = None
    ) -> T:
        connection = await self._opened()
        seconds = self.timeout if timeout is None else timeout
        try:
            return await connection.request(what, send, timeout=seconds)
        finally:
            self._hooks.raise_failure()

    # -- tools ---------------------------------------------------------------------------------

    @property
    def tool_names(self) -> tuple[str, ...]:
        """The server's own names of its tools, in its order."""
        return tuple(self._catalogue.listed)

    async def toolset(
        self,
        *,
        include: Choice = None,
        exclude: Sequence[str] = (),
        prefix: str | None = None,
        resources: bool = False,
    ) -> FunctionToolset[Any]:
        """The server's tools as they are now, for an agent's ``toolsets``.

        A tool of the set whose definition changes later is refused when it is called.

        Args:
            include: the names of those to take, or which names; all by default.
            exclude: names to leave out.
            prefix: put before every name, with ``_``, as in ``prefix_name``.
            resources: add the tools ``list_resources`` and ``read_resource``.

        Raises:
            UserError: there is no tool of a given name, or two of one name come out.
            MCPToolChangedError: a tool has changed since it was approved, and nobody is asked.
            MCPProtocolError: the server's list is not one that can be used.
        """
        await self._refresh_if_stale()
        chosen = self._catalogue.choose(include, exclude)
        approved = [tool for tool in chosen if await self._catalogue.approved(tool)]
        tools = [offered_tool(self, tool, prefix) for tool in approved]
        if resources:
            tools += resource_tools(self, prefix)
        return FunctionToolset(tools, id=self.name)

    async def call(
        self, name: str, arguments: dict[str, Any] | None = None, *, timeout: float | None = None
    ) -> Any:
        """Call a tool by the server's own name; ``timeout`` (seconds) instead of the server's.

        Gives the structured content where there is some, else the text.

        Raises:
            ToolFailed: the tool says that it failed.
            MCPOutputTooLarge: the result is longer than ``max_output_chars``.
            MCPConnectionError, MCPProtocolError, MCPError: as their names say.
        """
        what = f"tools/call of {name!r}"

        async def send(client: mcp.Client) -> types.CallToolResult:
            return await client.call_tool(name, arguments or {})

        result = await self._request(what, send, timeout)
        value = result_value(result)
        check_size(self.name, what, value, self._max_output_chars)
        if result.is_error:
            raise ToolFailed(value or "the tool failed without a word")
        return value

    async def call_unchanged(self, name: str, arguments: dict[str, Any], sha256: str) -> Any:
        """:meth:`call`, but only where the tool's definition still has this sha256; for as long
        as it takes.

        Raises:
            MCPToolChangedError: it has not.
        """
        await self._refresh_if_stale()
        self._catalogue.check_unchanged(name, sha256)
        return await self.call(name, arguments, timeout=math.inf)

    async def reopen(self) -> None:
        """Make sure that the connection is open.

        Raises:
            MCPConnectionError: it cannot be opened. MCPProtocolError: as :meth:`toolset`.
        """
        await self._opened()

    async def _refresh_if_stale(self) -> None:
        await self._opened()
        if self._catalogue.stale:
            await self._request("tools/list", self._catalogue.read)

    # -- resources -----------------------------------------------------------------------------

    async def list_resources(self) -> list[MCPResource]:
        """What can be read, templates included.

        Raises:
            MCPConnectionError, MCPProtocolError, MCPError: as their names say.
        """
        return await self._request("resources/list", partial(read_resources, self.name))

    async def read_resource(self, uri: str) -> str:
        """A resource as text; of what is no text, what and how much it is.

        Raises:
            MCPOutputTooLarge: it is longer than ``max_output_chars``.
            MCPConnectionError, MCPProtocolError, MCPError: as their names say.
        """
        what = f"resources/read of {uri!r}"

        async def send(client: mcp.Client) -> types.ReadResourceResult:
            return await client.read_resource(uri)

        text = contents_text((await self._request(what, send)).contents)
        check_size(self.name, what, text, self._max_output_chars)
        return text
