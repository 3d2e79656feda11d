"""A server that runs as a process of ours and talks through its standard streams."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import IO, Any, TextIO

import anyio
import mcp
from typing_extensions import Unpack

from dspark_agent.mcp.server import ClientOptions, MCPServer, ServerOptions

Streams = tuple[Any, Any]
Transport = AbstractAsyncContextManager[Streams]
LAST_WORDS_BYTES = 2000
"""How much of a server's stderr an error shows."""


class MCPServerStdio(MCPServer):
    """An MCP server started as a subprocess, ended with ``async with``.

    Args:
        command: the program.
        args: its arguments.
        env: variables over a safe few of ours (PATH, HOME and their like): secrets of this
            process are not handed on.
        cwd: its working directory.
        stderr: where its stderr goes; None keeps it aside for error messages.
        options: see :class:`ServerOptions`; ``name`` is the command and its arguments by default.
    """

    def __init__(
        self,
        command: str,
        args: Sequence[str] = (),
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        stderr: TextIO | None = None,
        **options: Unpack[ServerOptions],
    ) -> None:
        default_name = " ".join([os.path.basename(command), *args])
        super().__init__(default_name=default_name, **options)
        self._parameters = mcp.StdioServerParameters(
            command=command,
            args=list(args),
            env=None if env is None else dict(env),
            cwd=None if cwd is None else os.fspath(cwd),
        )
        self._stderr = stderr
        self._aside: IO[bytes] | None = None

    def _begin(self) -> None:
        if self._stderr is None:
            self._aside = tempfile.TemporaryFile()  # noqa: SIM115 - closed in _end

    def _end(self) -> None:
        if self._aside is not None:
            self._aside.close()
            self._aside = None

    def _make_client(self, lost: anyio.Event, options: ClientOptions) -> mcp.Client:
        stderr: Any = self._stderr or self._aside  # the process wants its descriptor only
        return mcp.Client(_watched(mcp.stdio_client(self._parameters, stderr), lost), **options)

    def _last_words(self) -> str:
        if self._aside is None:
            return ""
        # Not seek and read: the process writes at the position of the same open file.
        descriptor = self._aside.fileno()
        size = os.fstat(descriptor).st_size
        kept = os.pread(descriptor, LAST_WORDS_BYTES, max(0, size - LAST_WORDS_BYTES))
        return kept.decode(errors="replace")


@asynccontextmanager
async def _watched(transport: Transport, lost: anyio.Event) -> AsyncIterator[Streams]:
    """``transport``, with ``lost`` set as soon as the server's side ends: a server that has died
    between two calls is found dead before the next one is sent."""
    async with transport as (read, write):
        send, receive = anyio.create_memory_object_stream[Any](0)

        async def forward() -> None:
            with send, suppress(anyio.ClosedResourceError, anyio.BrokenResourceError):
                async for message in read:
                    await send.send(message)
            lost.set()

        async with anyio.create_task_group() as group:
            group.start_soon(forward)
            with receive:
                yield receive, write
            group.cancel_scope.cancel()
