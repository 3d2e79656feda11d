"""Rollouts out of real runs: every step that an engine takes, as what a drafter learns from.

Prompts are one kind of training data; the steps of agents at work (tool calls, files written anew)
are the other, and are what a drafter meets in use.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path

from dspark_backend.engine import Engine
from dspark_backend.events import Finished, StepEvent
from dspark_backend.handle import StepHandle
from dspark_backend.request import StepRequest
from dspark_backend.session import Session
from dspark_backend.training.rollout import Rollout, to_json


class Recorder:
    """Writes finished steps to ``path`` (appended to, a rollout a line); ``source`` names the runs.

    Steps that wrote fewer than two tokens teach nothing and are left out, as is a step that was
    written before. Used from any thread.
    """

    def __init__(self, path: Path, source: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        self._source = source
        self._seen: set[str] = set()
        self._lock = threading.Lock()

    def write(self, prompt: tuple[int, ...], answer: tuple[int, ...], request: StepRequest) -> None:
        """``prompt`` is the session's log before the answer, the step's own tokens included."""
        key = hashlib.sha256(repr((prompt, answer)).encode()).hexdigest()[:24]
        with self._lock:
            if len(answer) < 2 or key in self._seen:
                return
            self._seen.add(key)
            self._file.write(to_json(Rollout(key, self._source, request.kind, prompt, answer)))
            self._file.flush()

    def close(self) -> None:
        self._file.close()


class RecordingEngine(Engine):
    """An engine whose finished steps go to :attr:`recorder` as well."""

    recorder: Recorder | None = None

    def submit(
        self,
        session: Session,
        request: StepRequest,
        on_event: Callable[[StepEvent], None] | None = None,
    ) -> StepHandle:
        """As :meth:`Engine.submit`."""
        recorder, before = self.recorder, session.tokens

        def note(event: StepEvent) -> None:
            if recorder is not None and isinstance(event, Finished):
                recorder.write((*before, *request.tokens), event.outcome.token_ids, request)
            if on_event is not None:
                on_event(event)

        return super().submit(session, request, note)
