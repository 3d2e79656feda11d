"""What the engine's log has already of a turn that has not begun."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

from dspark_agent.messages import ToolCallPart

if TYPE_CHECKING:
    from dspark_backend.engine import Engine
    from dspark_backend.handle import StepHandle
    from dspark_backend.session import Session

GRACE_S = 0.01
"""How long a tool runs before what follows it is computed: one that is over before a pass would be
gains nothing from a pass that is under way."""


class Ahead:
    """Tokens at the end of a session's log that no turn has said yet, computed in the background.

    They are a guess: :meth:`claim` compares them with what the turn says, and takes back what it
    does not begin with. So nothing that is said ever depends on them.
    """

    def __init__(self, engine: Engine, session: Session, tokens: Sequence[int] = ()) -> None:
        """``tokens`` are those that the log of a forked ``session`` has already."""
        self._engine = engine
        self._session = session
        self._tokens = tuple(tokens)
        self._prefill: StepHandle | None = None
        self._absences = Absences()

    @property
    def tokens(self) -> tuple[int, ...]:
        """The last tokens of the session's log that nobody has said."""
        return self._tokens

    @property
    def said(self) -> tuple[int, ...]:
        """The session's log without them."""
        log: tuple[int, ...] = self._session.tokens
        return log[: len(log) - len(self._tokens)]

    async def anticipate(self, call: ToolCallPart) -> None:
        """The log ends with ``call`` (and others after it): compute what its result begins with,
        and tell the engine when to expect the session back.

        Raises:
            BackendError: as :meth:`Engine.prefill`; nothing is ahead then.
        """
        usual_s = self._absences.leave(call.tool_name)
        await anyio.sleep(GRACE_S)
        if usual_s is not None:
            self._session.expect_return(max(0.0, usual_s - GRACE_S))
        head = await anyio.to_thread.run_sync(self._head, call, abandon_on_cancel=True)
        if not self._tokens:
            self._prefill = self._engine.prefill(self._session, head)
            self._tokens = tuple(head)

    def _head(self, call: ToolCallPart) -> list[int]:
        dialect = self._engine.dialect
        closed = self.said[-1] == dialect.end_of_turn_id
        head: list[int] = dialect.result_head(call.tool_name, call.tool_call_id, closed=closed)
        return head

    async def claim(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """What the log still lacks of ``tokens``, the next ones to be said; they count as said,
        and the step that sends the rest takes over from a prefill that is not done."""
        self._absences.back()
        known = len(self._tokens)
        if known < len(tokens) and tuple(tokens[:known]) == self._tokens:
            self._tokens = ()
            return tuple(tokens[known:])
        await self.drop()
        return tuple(tokens)

    async def settle(self) -> None:
        """End the prefill: the session is idle then."""
        prefill, self._prefill = self._prefill, None
        if prefill is not None and not prefill.done:
            prefill.cancel()
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(prefill.wait)

    async def drop(self) -> None:
        """Take the tokens back out of the log."""
        await self.settle()
        surplus, self._tokens = len(self._tokens), ()
        if surplus and not self._session.closed:
            self._session.rollback(surplus)


class Absences:
    """How long a session is usually away while a tool runs, by the tool's name."""

    def __init__(self) -> None:
        self._usual: dict[str, float] = {}
        self._left: tuple[str, float] | None = None

    def leave(self, tool_name: str) -> float | None:
        """The session leaves for a call of the tool: seconds it is usually away, None where that
        is not known."""
        self._left = tool_name, time.monotonic()
        return self._usual.get(tool_name)

    def back(self) -> None:
        """The session is back, if it was away."""
        if self._left is not None:
            (name, began), self._left = self._left, None
            seconds = time.monotonic() - began
            self._usual[name] = (seconds + self._usual.get(name, seconds)) / 2
