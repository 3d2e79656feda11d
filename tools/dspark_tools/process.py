"""Running a program in the workspace: limits, a clean environment, and an end that is the end.

The program runs below :mod:`dspark_tools.supervise`, which kills all it started. Time and output
are watched from here; memory and file sizes by the kernel.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import anyio
from anyio.abc import Process

from dspark_tools.workspace import WorkspaceError

_SUPERVISE = Path(__file__).with_name("supervise.py")
_STOP_S = 5.0
"""How long the supervisor may take to sweep before it is killed itself."""


@dataclass(frozen=True, slots=True)
class ProcessLimits:
    """What one run may use.

    Attributes:
        timeout_s: Wall clock of the run.
        memory_bytes: Address space of each process (``RLIMIT_AS``; Linux).
        file_bytes: Largest file the program may write (``RLIMIT_FSIZE``).
        output_bytes: Output that is kept: the first and the last half; the middle is left out.
        flood_bytes: Output after which the program is stopped, kept or not.
    """

    timeout_s: float = 60.0
    memory_bytes: int = 2 << 30
    file_bytes: int = 256 << 20
    output_bytes: int = 16 << 10
    flood_bytes: int = 32 << 20


@dataclass(frozen=True, slots=True)
class ProcessResult:
    """How a run ended.

    Attributes:
        status: Exit status, 128 + N when signal N ended the program, None when it was stopped.
        output: Standard output and error as written, within ``output_bytes``.
        stopped: Why the program was stopped, in words; None when it ended by itself.
        seconds: Wall clock.
    """

    status: int | None
    output: str
    stopped: str | None
    seconds: float

    def text(self) -> str:
        """The run as a model reads it: the output, then how it ended."""
        ending = f"stopped: {self.stopped}" if self.stopped else f"exit status {self.status}"
        return f"{self.output.rstrip()}\n[{ending}]".lstrip("\n")


async def run_process(
    command: Sequence[str],
    *,
    folder: Path,
    limits: ProcessLimits = ProcessLimits(),
    environment: Mapping[str, str] | None = None,
) -> ProcessResult:
    """Runs ``command`` in ``folder`` until it ends or reaches a limit.

    Nothing it started outlives the call, cancellation included. Standard input is empty; home and
    temporary folder are one fresh folder, gone afterwards.

    Args:
        command: The program, looked up on a fixed search path, and its arguments.
        folder: Working folder.
        limits: What the run may use.
        environment: Variables added to the clean environment.

    Raises:
        WorkspaceError: The command is no valid argument list. A program that does not exist is
            a result with status 127, as in a shell.
    """
    started = time.perf_counter()
    output = _Output(limits.output_bytes)
    stopped: str | None = None
    with tempfile.TemporaryDirectory(prefix="dspark-run-", ignore_cleanup_errors=True) as scratch:
        supervised = [sys.executable, "-I", "-S", str(_SUPERVISE)]
        supervised += [str(limits.memory_bytes), str(limits.file_bytes), *command]
        try:
            process = await anyio.open_process(
                supervised,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={**_clean_environment(scratch), **(environment or {})},
                start_new_session=True,
            )
        except (ValueError, OSError) as error:  # a NUL or lone surrogate in it, or too long
            raise WorkspaceError(f"the command cannot be started: {error}.") from None
        try:
            with anyio.move_on_after(limits.timeout_s) as clock:
                # The supervisor holds the pipe too: the end of output is the end of the run.
                if not await _read_all(process, output, limits.flood_bytes):
                    stopped = f"it printed more than {limits.flood_bytes:,} bytes"
            if clock.cancelled_caught:
                stopped = f"it ran longer than {limits.timeout_s:g} seconds"
        finally:
            with anyio.CancelScope(shield=True):
                status = await _end(process)
    return ProcessResult(
        status=None if stopped else status,
        output=output.text(),
        stopped=stopped,
        seconds=time.perf_counter() - started,
    )


async def _read_all(process: Process, output: _Output, flood_bytes: int) -> bool:
    """Reads until the end of output; False when there is more than ``flood_bytes`` of it."""
    assert process.stdout is not None
    async for chunk in process.stdout:
        output.add(chunk)
        if output.seen_bytes > flood_bytes:
            return False
    return True


async def _end(process: Process) -> int:
    """Has the supervisor sweep, if it has not already, and returns its exit status."""
    assert process.stdin is not None
    with anyio.move_on_after(_STOP_S):
        await process.stdin.aclose()
        await process.wait()
    if process.returncode is None:
        process.kill()
    status = await process.wait()
    await process.aclose()
    return status


class _Output:
    """Keeps the first and the last half of ``limit_bytes``: errors are at the end, and what a
    program was about is at the start."""

    def __init__(self, limit_bytes: int) -> None:
        self.seen_bytes = 0
        self._half = limit_bytes // 2
        self._head = bytearray()
        self._tail = bytearray()

    def add(self, chunk: bytes) -> None:
        self.seen_bytes += len(chunk)
        room = self._half - len(self._head)
        self._head += chunk[:room]
        self._tail += chunk[room:]
        del self._tail[: -self._half]

    def text(self) -> str:
        left_out = self.seen_bytes - len(self._head) - len(self._tail)
        note = f"\n[... {left_out:,} bytes left out ...]\n".encode() if left_out else b""
        return bytes(self._head + note + self._tail).decode(errors="replace")


def _clean_environment(scratch: str) -> dict[str, str]:
    """What a program sees: nothing of the user's, so no key or token either."""
    return {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.defpath, "/usr/local/bin"]),
        "HOME": scratch,
        "TMPDIR": scratch,
        "LANG": "C.UTF-8",
        "TERM": "dumb",
        "NO_COLOR": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONIOENCODING": "utf-8",
        "PYTHONUNBUFFERED": "1",
    }
