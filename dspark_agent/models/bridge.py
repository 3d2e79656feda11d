"""Values from a foreign thread to a task, on asyncio and trio alike."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import anyio
import anyio.lowlevel

T = TypeVar("T")


class ThreadBridge(Generic[T]):
    """A queue: :meth:`put` from any thread, never blocking it; :meth:`get_all` in the task that
    made the bridge."""

    def __init__(self) -> None:
        self._values: deque[T] = deque()
        self._arrived = anyio.Event()
        self._wake_soon = _scheduler()

    def put(self, value: T) -> None:
        """Add a value and wake the task. A value for an event loop that has ended is dropped."""
        self._values.append(value)
        try:
            self._wake_soon(self._wake)
        except RuntimeError:
            self._values.clear()

    async def get_all(self) -> list[T]:
        """All values that have arrived, in order; waits for the first one."""
        while not self._values:
            await self._arrived.wait()
            self._arrived = anyio.Event()
        return [self._values.popleft() for _ in range(len(self._values))]

    def _wake(self) -> None:
        self._arrived.set()


def _scheduler() -> Callable[[Callable[[], Any]], Any]:
    """How this task's event loop is told, from another thread, to call something soon."""
    token = anyio.lowlevel.current_token().native_token
    if isinstance(token, asyncio.AbstractEventLoop):
        return token.call_soon_threadsafe
    schedule: Callable[[Callable[[], Any]], Any] = token.run_sync_soon  # type: ignore[attr-defined]
    return schedule
