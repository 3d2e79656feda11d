"""Where journals are kept: the interface that a store implements.

Both methods may block: the SDK calls them in worker threads, one call of a run at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class RunLog(Protocol):
    """The entries of one run, and the right to add to them."""

    @property
    def where(self) -> str:
        """The store and the run, for error messages."""
        ...

    def read(self) -> Sequence[str]:
        """All entries (JSON texts), in the order in which they were appended."""
        ...

    def append(self, entry: str) -> None:
        """Add an entry. It outlives the process once this returns.

        Raises:
            JournalError: it could not be written.
        """
        ...

    def close(self) -> None:
        """Give up the right to write. A process that dies gives it up as well."""
        ...


class Journal(Protocol):
    """Keeps what runs have done, so that :meth:`Agent.resume` goes on from it after a crash."""

    def open(self, run_id: str) -> RunLog:
        """The log of a run (an empty one where there is none yet), for one writer at a time.

        Raises:
            JournalLockedError: somebody else has it open.
            JournalError: it cannot be read or made.
        """
        ...
