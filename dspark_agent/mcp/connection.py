"""A connection to a server that is opened again when it is lost.

A client of the ``mcp`` package must be opened and closed in one task, while calls come from many:
so a task of its own holds it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import anyio
import mcp
import mcp_types as types
from pydantic import ValidationError

from dspark_agent.errors import DSparkError, MCPConnectionError, MCPError, MCPProtocolError
from dspark_agent.function_schema import validation_text

T = TypeVar("T")
ClientFactory = Callable[[anyio.Event], mcp.Client]
"""Makes a client that is not open yet; it sets the event when it finds the connection lost."""
_LOST_CODES = frozenset({types.CONNECTION_CLOSED})
_SESSION_GONE = "Session terminated"


class Connection:
    """Keeps one client open.

    ``on_open`` is awaited with every client before anybody else sees it; ``watch`` runs beside it
    while it is open. ``describe`` gives the server's last words on stderr, if they are known.
    """

    def __init__(
        self,
        server: str,
        make_client: ClientFactory,
        *,
        connect_timeout: float,
        on_open: Callable[[mcp.Client], Awaitable[None]],
        watch: Callable[[mcp.Client], Coroutine[Any, Any, None]],
        describe: Callable[[], str],
    ) -> None:
        self.server = server
        self._make_client = make_client
        self._connect_timeout = connect_timeout
        self._on_open = on_open
        self._watch = watch
        self._describe = describe
        self._client: mcp.Client | None = None
        self._lost = anyio.Event()
        self._failure: Exception | None = None
        self._asked = anyio.Event()
        self._answered = anyio.Event()
        self._opening = anyio.Lock()
        self._closing = False

    async def hold(self) -> None:
        """Open clients as they are asked for, until :meth:`close`."""
        while True:
            await self._asked.wait()
            if self._closing:
                return
            self._asked = anyio.Event()
            self._lost = anyio.Event()
            # The next one may be asked for before this one has let go of a dying server.
            answered = self._answered
            try:
                await self._hold_one(self._lost, answered)
            except Exception as error:
                self._failure = error
            finally:
                self._client = None
                answered.set()

    async def _hold_one(self, lost: anyio.Event, answered: anyio.Event) -> None:
        timeout = self._connect_timeout
        with anyio.CancelScope(deadline=anyio.current_time() + timeout) as scope:
            async with self._make_client(lost) as client:
                await self._on_open(client)
                scope.deadline = float("inf")
                self._client = client
                answered.set()
                async with anyio.create_task_group() as group:
                    group.start_soon(self._watch, client)
                    await lost.wait()
                    self._client = None
                    group.cancel_scope.cancel()
        if scope.cancelled_caught:
            raise MCPConnectionError(
                self.server, f"not connected within connect_timeout={timeout:g} s{self._words()}"
            )

    def close(self) -> None:
        """Let :meth:`hold` close the client and end; no client is opened any more."""
        self._closing = True
        self._lost.set()
        self._asked.set()
        self._answered.set()

    async def client(self) -> mcp.Client:
        """The open client; opens one if there is none.

        Raises:
            MCPConnectionError, MCPProtocolError: it cannot be opened.
        """
        async with self._opening:
            if (self._client is None or self._lost.is_set()) and not self._closing:
                self._failure = None
                self._answered = anyio.Event()
                self._asked.set()
                await self._answered.wait()
            if self._client is None:
                raise self._opening_error(self._failure)
            return self._client

    async def request(
        self, what: str, send: Callable[[mcp.Client], Awaitable[T]], *, timeout: float | None
    ) -> T:
        """Send one request; ``what`` names it in errors, ``timeout`` is in seconds.

        Raises:
            MCPConnectionError: no connection, none any more, or no answer in time.
            MCPProtocolError: the answer is not what the protocol says it is.
            MCPError: the server refuses.
        """
        client = await self.client()
        lost = self._lost
        try:
            with anyio.fail_after(timeout):
                return await send(client)
        except TimeoutError:
            raise MCPConnectionError(
                self.server, f"no answer to {what} within {timeout or 0:g} s"
            ) from None
        except mcp.MCPError as error:
            if error.code in _LOST_CODES or error.message == _SESSION_GONE:
                lost.set()
                raise MCPConnectionError(
                    self.server,
                    f"the connection was lost during {what}; whether it was done is not known"
                    f"{self._words()}",
                ) from error
            raise MCPError(
                self.server, f"{what}: {error.message} (code {error.code})", code=error.code
            ) from error
        except (ValidationError, RuntimeError) as error:
            raise MCPProtocolError(self.server, f"{what}: {_begin_of(error)}") from error

    def _opening_error(self, failure: Exception | None) -> DSparkError:
        error = _bare(failure)
        if error is None:
            return MCPConnectionError(self.server, "it was closed")
        if isinstance(error, DSparkError):
            return error
        if isinstance(error, ValidationError):
            wrong = MCPProtocolError(self.server, f"on connecting: {_begin_of(error)}")
            wrong.__cause__ = error
            return wrong
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        lost = MCPConnectionError(self.server, f"cannot connect ({reason}){self._words()}")
        lost.__cause__ = error
        return lost

    def _words(self) -> str:
        words = self._describe().strip()
        return f"\nits last words on stderr:\n{words}" if words else ""


def _bare(error: Exception | None) -> BaseException | None:
    """The first error inside of groups, which task groups wrap errors in."""
    found: BaseException | None = error
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found


def _begin_of(error: Exception, limit: int = 500) -> str:
    text = validation_text(error) if isinstance(error, ValidationError) else str(error)
    return text if len(text) <= limit else f"{text[:limit]}..."
