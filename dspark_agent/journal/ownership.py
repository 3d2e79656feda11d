"""Who writes a run: a lock that the operating system takes back when its owner dies.

Each process that has a journal open holds a lock file of its own beside it; a claim to a run names
that file. So a run of a dead process is told from one that is being written, on any machine state.
"""

from __future__ import annotations

import os
import socket
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

from filelock import FileLock, Timeout


class Ownership:
    """This process's hold on runs of one journal. ``token`` names it, ``owner`` describes it."""

    def __init__(self, journal: Path) -> None:
        self.token = uuid4().hex[:12]
        since = datetime.now(tz=UTC).isoformat(timespec="seconds")
        self.owner = f"process {os.getpid()} on {socket.gethostname()} (since {since})"
        self._path = _lock_file(journal, self.token)
        self._lock = _lock(self._path)
        self._lock.acquire(timeout=0)

    def close(self) -> None:
        """Give up every claim that names this token."""
        self._lock.release()
        self._path.unlink(missing_ok=True)


def is_alive(journal: Path, token: str) -> bool:
    """Whether the process that made ``token`` still holds it; the lock file of a dead one is
    removed."""
    path = _lock_file(journal, token)
    if not path.exists():
        return False
    lock = _lock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    path.unlink(missing_ok=True)
    return False


def _lock_file(journal: Path, token: str) -> Path:
    return journal.with_name(f"{journal.name}.{token}.lock")


def _lock(path: Path) -> FileLock:
    # Taken in one worker thread and given back in another.
    return FileLock(path, thread_local=False)
