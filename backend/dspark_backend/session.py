"""One conversation in the engine: an append-only log of tokens and their keys and values."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from dspark_backend.errors import RequestError, SessionClosedError
from dspark_backend.kv.sequence import KV
from dspark_backend.request import StepKind
from dspark_backend.speculation.copy import CopyProposer
from dspark_backend.speculation.copy_acceptance import CopyAcceptance
from dspark_backend.speculation.memory import Memory

if TYPE_CHECKING:
    from dspark_backend.running import RunningStep


class SessionOwner(Protocol):
    """What a session needs of its engine; ``lock`` guards logs, KV and the set of sessions."""

    @property
    def lock(self) -> AbstractContextManager[Any]: ...

    def fork(self, session: Session) -> Session: ...

    def closed(self, session: Session) -> None: ...


class Session:
    """A token log, append-only but for an explicit :meth:`rollback`.

    The log is the truth: generated tokens are never decoded and encoded again, so a step computes
    the tokens that are new and nothing else. Made by :meth:`Engine.open_session`; one step at a
    time; methods may be called from any thread.
    """

    def __init__(self, kv: KV, owner: SessionOwner, memory: Memory) -> None:
        self._owner = owner
        self.memory = memory
        self._closed = False
        self.log: list[int] = []
        """The engine's own view of the log: read :attr:`tokens` instead."""
        self.kv = kv
        self.running: RunningStep | None = None
        self._copies: CopyProposer | None = None
        self._unquoted: list[tuple[int, int]] = []  # where the log came from outside
        self._kept = 0  # tokens of the log that the memory has
        self.idle_since = time.monotonic()
        self.expected_at: float | None = None

    @property
    def tokens(self) -> tuple[int, ...]:
        """Prompt and generated tokens so far, end-of-turn tokens included."""
        with self._owner.lock:
            return tuple(self.log)

    def read(self, tokens: Sequence[int]) -> None:
        """The log goes on with ``tokens`` that came from outside; for the holder of the lock."""
        self._unquoted.append((len(self.log), len(self.log) + len(tokens)))
        self.log.extend(tokens)

    def copies(self, acceptance: CopyAcceptance, kind: StepKind) -> CopyProposer:
        """What has been written or read here before and may come again, up to the log's end; for
        the engine's thread. All that a step writes may be JSON unless its ``kind`` is text."""
        if self._copies is None:
            self._copies = CopyProposer(acceptance, self.memory.corpus)
        self._copies.append(self.log[len(self._copies) :])
        if kind is not StepKind.TEXT:
            spans, self._unquoted = self._unquoted, []
            for begin, end in spans:
                self.memory.quote(self.log[begin:end])
        return self._copies

    def step_ended(self) -> None:
        """The step in flight is over; for the holder of the lock."""
        self.running = None
        self.idle_since = time.monotonic()
        self.memory.keep(self.log[self._kept :])
        self._kept = len(self.log)

    @property
    def cached_tokens(self) -> int:
        """How many tokens of the log have their keys and values computed."""
        with self._owner.lock:
            return self.kv.length

    @property
    def closed(self) -> bool:
        return self._closed

    def expect_return(self, seconds: float) -> None:
        """Say that the next step is about ``seconds`` away, as when a tool has started.

        A hint: where memory is short, the session that returns last gives its keys and values up
        first (they are computed again then). Raises RequestError if ``seconds`` is negative.
        """
        if not seconds >= 0.0:
            raise RequestError(f"a session returns in 0 seconds or more, not {seconds}")
        with self._owner.lock:
            self.expected_at = time.monotonic() + seconds

    def fork(self) -> Session:
        """A session with the same log and a copy of the computed keys and values.

        Raises SessionClosedError if this one is closed or has a step in flight, CapacityError if
        the KV memory does not hold another copy.
        """
        with self._owner.lock:
            self.check_idle("fork it")
            twin = self._owner.fork(self)
            if self._copies is not None:
                twin._copies = self._copies.fork()
            twin._unquoted, twin._kept = [*self._unquoted], self._kept
            return twin

    def rollback(self, count: int) -> None:
        """Forget the last ``count`` tokens of the log.

        Raises RequestError if the log is shorter, SessionClosedError as :meth:`fork`.
        """
        with self._owner.lock:
            self.check_idle("roll it back")
            if not 0 <= count <= len(self.log):
                raise RequestError(
                    f"cannot roll back {count} tokens: the session's log holds {len(self.log)}"
                )
            del self.log[len(self.log) - count :]
            self.kv.truncate(min(self.kv.length, len(self.log)))
            if self._copies is not None:
                self._copies.truncate(min(len(self._copies), len(self.log)))
            length = len(self.log)
            self._kept = min(self._kept, length)
            self._unquoted = [(a, min(b, length)) for a, b in self._unquoted if a < length]

    def close(self) -> None:
        """Cancel a step in flight and give the memory up. Idempotent.

        The beginning of the log stays in the engine's prefix cache while there is room for it.
        """
        with self._owner.lock:
            if self._closed:
                return
            self._closed = True
            if self.running is not None:
                self.running.cancel()
            self._owner.closed(self)

    @property
    def prefilling(self) -> RunningStep | None:
        """The prefill in flight, if the session is open and that is all it does."""
        running = self.running
        if self._closed or running is None or not running.is_prefill:
            return None
        return running

    def check_idle(self, purpose: str) -> None:
        """Raises SessionClosedError unless the session is open and no step is in flight."""
        if self._closed:
            raise SessionClosedError(f"the session is closed; open another one to {purpose}")
        if self.running is not None:
            raise SessionClosedError(
                f"the session has a step in flight; wait for its result or cancel it to {purpose}"
            )

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
