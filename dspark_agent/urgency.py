"""Who waits for a piece of work, handed down from a run to the agents that its tools run."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

from dspark_agent.errors import UserError

Urgency = Literal["critical", "interactive", "background"]
"""``critical``: other work waits for it; ``interactive``: somebody does; ``background``: nobody."""

_RANK: dict[Urgency, int] = {"critical": 0, "interactive": 1, "background": 2}


@dataclass(frozen=True, slots=True)
class Standing:
    """How soon a turn is wanted; ``deadline`` is on the clock of ``time.monotonic``, ``inf`` when
    there is none (event loops have clocks of their own, threads run loops of their own)."""

    urgency: Urgency = "interactive"
    deadline: float = math.inf

    @property
    def deadline_s(self) -> float | None:
        """Seconds from now until the deadline (0.0 when it has passed), None when there is none."""
        if self.deadline == math.inf:
            return None
        return max(0.0, self.deadline - time.monotonic())


_waited_for: ContextVar[Standing | None] = ContextVar("dspark_agent_waited_for", default=None)


def standing(own: Urgency | None, remaining_s: float) -> Standing:
    """The standing of work with settings of its ``own`` that must be over in ``remaining_s``
    seconds (``inf``: any time).

    Where a parent waits for it (see :func:`waited_for`), it is at least as urgent as the parent's
    work, and the tighter deadline holds.

    Raises:
        UserError: ``own`` is no urgency.
    """
    if own is not None and own not in _RANK:
        raise UserError(f"urgency {own!r} is not known; there are {', '.join(_RANK)}")
    parent = _waited_for.get()
    deadline = time.monotonic() + remaining_s
    if parent is None:
        return Standing(own or "interactive", deadline)
    urgency = min((own or parent.urgency, parent.urgency), key=_RANK.__getitem__)
    return Standing(urgency, min(deadline, parent.deadline))


@contextmanager
def waited_for(parent: Standing) -> Iterator[None]:
    """Work that begins in here, tasks and worker threads included, is part of ``parent``'s."""
    token = _waited_for.set(parent)
    try:
        yield
    finally:
        _waited_for.reset(token)
