"""What a caller holds of a submitted step."""

from __future__ import annotations

import queue
from collections.abc import Iterator

from dspark_backend.events import Failed, Finished, StepEvent
from dspark_backend.request import StepOutcome
from dspark_backend.running import RunningStep


class StepHandle:
    """Follows one step. Events can be read once, by one thread; :meth:`cancel` is for any."""

    def __init__(self, running: RunningStep) -> None:
        self._running = running
        self._last: Finished | Failed | None = None

    def cancel(self) -> None:
        """End the step within one iteration of the engine; its result says ``cancelled``."""
        self._running.cancel()

    @property
    def done(self) -> bool:
        """Whether the step is over, for whatever reason."""
        return self._running.over.is_set()

    def wait(self) -> None:
        """Wait for the end of the step, whatever it ends with."""
        self._running.over.wait()

    def events(self) -> Iterator[StepEvent]:
        """All events not read yet, as they come; ends after ``Finished`` or ``Failed``."""
        while self._last is None:
            yield self._next(None)

    def ready_events(self, timeout: float | None = None) -> list[StepEvent]:
        """Wait for the next event, at most ``timeout`` seconds, and take all there are.

        Empty when nothing came in time, or when the step's last event was taken before.
        """
        events: list[StepEvent] = []
        while self._last is None:
            try:
                events.append(self._next(0.0 if events else timeout))
            except queue.Empty:
                break
        return events

    def result(self, timeout: float | None = None) -> StepOutcome:
        """Wait for the end of the step; whoever waits here is not woken by every token.

        Raises what the step died of (a BackendError where the reason is known), TimeoutError when
        the step is not over after ``timeout`` seconds.
        """
        if not self._running.over.wait(timeout):
            raise TimeoutError(f"the step is not over after {timeout} s; it goes on")
        while self._last is None:
            self._next(0.0)
        if isinstance(self._last, Failed):
            raise self._last.error
        return self._last.outcome

    def _next(self, timeout: float | None) -> StepEvent:
        events = self._running.events
        event = events.get_nowait() if timeout == 0.0 else events.get(timeout=timeout)
        if isinstance(event, Finished | Failed):
            self._last = event
        return event
