"""What a tool, an instruction function or an output validator may know about its run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic

import anyio
import anyio.from_thread
import anyio.lowlevel
from typing_extensions import TypeVar

from dspark_agent.budget import Budget
from dspark_agent.errors import RunCancelled, UserError
from dspark_agent.limits import RunUsage
from dspark_agent.messages import ModelRequest, ModelResponse

if TYPE_CHECKING:
    from dspark_agent.session import Session

DepsT = TypeVar("DepsT", default=object)
DepsT_co = TypeVar("DepsT_co", default=object, covariant=True)
DepsT_contra = TypeVar("DepsT_contra", default=object, contravariant=True)


@dataclass(slots=True)
class Cancellation:
    """The outermost cancel scope around a run (or a single step): cancelling it ends the token
    loop and every tool. ``scope`` is None where nothing is running."""

    scope: anyio.CancelScope | None = None
    reason: str | None = None

    def cancel(self, reason: str) -> None:
        """Cancel the work. From a tool's thread or from the event loop alike."""
        self.reason = reason
        if self.scope is not None:
            _on_event_loop(self.scope.cancel)


def _on_event_loop(function: Callable[[], object]) -> None:
    try:
        anyio.lowlevel.current_token()
    except RuntimeError:
        anyio.from_thread.run_sync(function)
    else:
        function()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext(Generic[DepsT_co]):
    """The run as one call sees it.

    ``deps`` is what the caller passed to the run; ``messages`` the conversation so far; ``usage``
    what the session has used; ``run_step`` the step's number, from 0. ``retry`` counts how often
    in a row this tool (or output) has been refused, of ``max_retries`` allowed;
    ``tool_call_approved`` says whether somebody approved this very call. ``deadline`` is on the
    event loop's clock (``anyio.current_time()``), ``inf`` when there is none. Give the context on
    as ``parent=ctx`` to a run that is part of this one.
    """

    deps: DepsT_co
    messages: Sequence[ModelRequest | ModelResponse]
    usage: RunUsage
    run_step: int = 0
    retry: int = 0
    max_retries: int = 0
    tool_name: str | None = None
    tool_call_id: str | None = None
    tool_call_approved: bool = False
    deadline: float = float("inf")
    cancellation: Cancellation = field(default_factory=Cancellation, repr=False)
    budgets: tuple[Budget, ...] = field(default=(), repr=False)
    forker: Callable[[], Awaitable[Session[Any, Any]]] | None = field(default=None, repr=False)

    @property
    def remaining_s(self) -> float:
        """Seconds until the deadline; ``inf`` when there is none. On the event loop only."""
        return self.deadline - anyio.current_time()

    @property
    def cancelled(self) -> bool:
        """Whether :meth:`cancel` was called."""
        return self.cancellation.reason is not None

    def cancel(self, reason: str = "a tool asked for it") -> None:
        """Cancel the whole run; it raises :class:`~dspark_agent.RunCancelled` with ``reason``."""
        self.cancellation.cancel(reason)

    async def fork(self) -> Session[DepsT_co, Any]:
        """A session of the same agent that starts with what was said before this step, as part of
        this run; on the embedded model it shares the run's KV. Use it with ``async with``.

        The request that the model answered with this call is still open in the fork: the fork's
        first step answers it, together with the prompt that the step is given.

        Raises:
            UserError: no step is in flight (in an instruction function).
        """
        if self.forker is None:
            raise UserError("ctx.fork() is for tools and validators: no step is in flight here")
        return await self.forker()

    def check_cancelled(self) -> None:
        """Stop here when the run was cancelled or its deadline has passed.

        For long work in a synchronous tool: a thread cannot be interrupted from outside.

        Raises:
            RunCancelled: after :meth:`cancel`; otherwise the event loop's own cancellation.
        """
        if self.cancellation.reason is not None:
            raise RunCancelled(self.cancellation.reason)
        try:
            anyio.lowlevel.current_token()
        except RuntimeError:
            anyio.from_thread.check_cancelled()
