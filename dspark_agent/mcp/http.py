"""A server that is reached over streamable HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import anyio
import httpx2
import mcp
from mcp.client.streamable_http import streamable_http_client
from typing_extensions import Unpack

from dspark_agent.errors import UserError
from dspark_agent.mcp.server import ClientOptions, MCPServer, ServerOptions

IO_TIMEOUT_S = 30.0
"""To connect, and to write; reading waits for as long as the request may take."""


class MCPServerHTTP(MCPServer):
    """An MCP server at a URL, over streamable HTTP.

    Args:
        url: of its endpoint.
        headers: sent with every request (``Authorization``, for one).
        options: see :class:`ServerOptions`; ``name`` is the URL by default, without user, password
            and query.

    Raises:
        UserError: the URL is none.
    """

    def __init__(
        self,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        **options: Unpack[ServerOptions],
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"MCPServerHTTP({url!r}): give a URL, such as 'https://host/mcp'")
        host = parts.netloc.rpartition("@")[2]
        super().__init__(default_name=f"{parts.scheme}://{host}{parts.path}", **options)
        self._url = url
        self._headers = dict(headers or {})

    def _make_client(self, lost: anyio.Event, options: ClientOptions) -> mcp.Client:
        return mcp.Client(self._transport(), **options)

    @asynccontextmanager
    async def _transport(self) -> AsyncIterator[Any]:
        timeout = httpx2.Timeout(IO_TIMEOUT_S, read=None)
        async with (
            httpx2.AsyncClient(headers=self._headers, timeout=timeout) as http,
            streamable_http_client(self._url, http_client=http) as streams,
        ):
            yield streams
