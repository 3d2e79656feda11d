"""The small process between a tool and the program it runs: limits before, a clean sweep after.

Run as a script, by :mod:`dspark_tools.process`, with the limits as arguments; imports only what
starts fast. It starts the program in a group of its own, and ends everything the program left
behind, in whatever group or session, when the program ends, when standard input reaches its end
(the tool's side cancelled, or died), or on SIGTERM. On Linux orphans are adopted by this process
(``PR_SET_CHILD_SUBREAPER``), so nothing escapes by detaching itself; elsewhere the program's
group is what dies.

Being single-threaded, it may set limits between fork and exec, which the tool's own process,
full of threads, may not.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import sys
from types import FrameType

NOT_FOUND = 127
"""Exit status when the program cannot be started, as in a shell."""


def main(arguments: list[str]) -> int:
    """``memory_bytes file_bytes program [argument ...]``: runs the program, returns its status
    (128 + N when signal N ended it)."""
    memory_bytes, file_bytes, *command = arguments
    adopts_orphans = _adopt_orphans()
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, _ignore)
    signal.signal(signal.SIGTERM, _ignore)

    program = os.fork()
    if program == 0:
        _become(command, int(memory_bytes), int(file_bytes))
    status = _wait(program, wake_read)
    _sweep(program, adopts_orphans)
    return status


def _wait(program: int, wake: int) -> int:
    """The program's exit status, or 128 + SIGKILL when it was told to stop first."""
    while True:
        ready, _, _ = select.select([sys.stdin.fileno(), wake], [], [])
        # Adopted orphans are reaped on the way; the program itself is among the children until
        # its status was read, so the loop ends.
        ended = -1
        while ended:
            ended, status = os.waitpid(-1, os.WNOHANG)
            if ended == program:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code
        # Only the end of input is ever readable there: the tool writes nothing.
        if sys.stdin.fileno() in ready or signal.SIGTERM in os.read(wake, 64):
            return 128 + signal.SIGKILL


def _sweep(program: int, adopts_orphans: bool) -> None:
    """Kills until no child is left: each death hands the orphans over to this process."""
    try:  # noqa: SIM105 - contextlib would double the time this script takes to start
        os.killpg(program, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # the group is empty, or holds only members that are dead but not yet reaped
    while True:
        for child in _children() if adopts_orphans else ():
            try:
                os.kill(child, signal.SIGKILL)
            except ProcessLookupError:
                continue
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _children() -> list[int]:
    """Process ids whose parent is this process, from /proc."""
    me = os.getpid()
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    # The command's name, in parentheses, may itself hold spaces and parentheses.
                    fields = file.read().rpartition(b")")[2].split()
            except OSError:
                continue  # it ended meanwhile
            if int(fields[1]) == me:
                found.append(int(name))
    return found


def _become(command: list[str], memory_bytes: int, file_bytes: int) -> None:
    """In the child: the group, the limits, then the program. Never returns."""
    try:
        os.setpgid(0, 0)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # Python ignores these at start; a program expects the system's defaults.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
        os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"cannot run {command[0]!r}: {error.strerror}\n".encode())
    finally:
        os._exit(NOT_FOUND)


def _adopt_orphans() -> bool:
    """Asks Linux to make this process the parent of its orphaned descendants."""
    if sys.platform != "linux":
        return False
    import ctypes

    pr_set_child_subreaper = 36
    return bool(ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1, 0, 0, 0) == 0)


def _ignore(signal_number: int, frame: FrameType | None) -> None:
    """Lets the wake-up pipe tell: a handler must exist for the byte to be written."""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
