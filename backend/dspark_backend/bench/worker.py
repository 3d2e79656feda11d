"""A contender in a process of its own: its memory, threads and crashes are its own too.

The parent sends ``(method, arguments)`` and gets ``("ok", value)`` or ``("error", text)`` back;
only one contender works at a time, so the others' processes wait and leave the cores alone.
"""

from __future__ import annotations

import importlib
import multiprocessing
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

from dspark_backend.bench.contender import Contender, ContenderSpec, Loaded, Sample, Turn
from dspark_backend.bench.errors import BenchError
from dspark_backend.bench.host import peak_rss_bytes
from dspark_backend.errors import BackendError

_EXIT_S = 10.0


class Worker:
    """Drives one contender. ``factory`` is ``"module:callable"``, called with the spec there."""

    def __init__(self, name: str, factory: str, spec: ContenderSpec) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._conn, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, factory, spec), name=f"bench-{name}", daemon=True
        )
        self._process.start()
        theirs.close()
        try:
            self.loaded: Loaded = self._receive()
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        """Begins a new conversation."""
        self._call("start")

    def turn(self, turn: Turn) -> Sample:
        """Runs one turn over there.

        Raises:
            BenchError: the contender failed or its process ended.
        """
        sample: Sample = self._call("turn", turn)
        return sample

    def peak_rss_bytes(self) -> int:
        """The largest resident set of the contender's process so far, loading included."""
        peak: int = self._call("peak_rss_bytes")
        return peak

    def close(self) -> None:
        """Ends the process, once its turn is over; safe to call twice."""
        self._end(_EXIT_S)

    def _end(self, wait_s: float) -> None:
        self._conn.close()
        self._process.join(wait_s)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # After an error, or Ctrl-C, nobody waits for the turn that may still be running.
        self._end(_EXIT_S if error is None else 0.0)

    def _call(self, method: str, *arguments: object) -> Any:
        try:
            self._conn.send((method, arguments))
        except OSError as error:
            raise self._gone() from error
        return self._receive()

    def _receive(self) -> Any:
        try:
            status, value = self._conn.recv()
        except (EOFError, ConnectionError) as error:
            raise self._gone() from error
        if status == "ok":
            return value
        raise BenchError(f"{self.name}: {value}")

    def _gone(self) -> BenchError:
        self._process.join(_EXIT_S)
        return BenchError(
            f"{self.name}: its process ended with code {self._process.exitcode}; "
            "out of memory is the usual cause"
        )


def _serve(conn: Connection, factory: str, spec: ContenderSpec) -> None:
    """The worker's life: build the contender, answer calls until the parent hangs up."""
    # Ctrl-C reaches the whole group: the parent reports it and hangs up, which ends this loop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    module, _, attribute = factory.partition(":")
    try:
        build: Callable[[ContenderSpec], Contender] = getattr(
            importlib.import_module(module), attribute
        )
        contender = build(spec)
    except Exception as error:
        conn.send(("error", _describe(error)))
        return
    conn.send(("ok", contender.loaded))
    try:
        _answer(conn, contender)
    finally:
        contender.close()


def _answer(conn: Connection, contender: Contender) -> None:
    while True:
        try:
            method, arguments = conn.recv()
        except (EOFError, ConnectionError):
            return
        try:
            if method == "peak_rss_bytes":
                value: object = peak_rss_bytes()
            else:
                value = getattr(contender, method)(*arguments)
        except Exception as error:
            conn.send(("error", _describe(error)))
        else:
            conn.send(("ok", value))


def _describe(error: Exception) -> str:
    """A planned error by its message; anything else with where it came from."""
    if isinstance(error, BackendError | ImportError):
        return str(error)
    return "".join(traceback.format_exception(error)).rstrip()
