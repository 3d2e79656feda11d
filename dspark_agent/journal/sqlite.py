"""Journals in one SQLite file: many runs, each written by one process at a time."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from dspark_agent.errors import JournalError, JournalLockedError, UserError
from dspark_agent.journal.ownership import Ownership, is_alive

T = TypeVar("T")
_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (
    run_id TEXT NOT NULL, number INTEGER NOT NULL, entry TEXT NOT NULL,
    PRIMARY KEY (run_id, number)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS owners (
    run_id TEXT PRIMARY KEY, token TEXT NOT NULL, owner TEXT NOT NULL
) WITHOUT ROWID;
"""
_UNFINISHED = """
SELECT run_id FROM entries GROUP BY run_id
HAVING max(json_extract(entry, '$.kind') = 'run-ended') = 0
   AND max(json_extract(entry, '$.kind') = 'run-begun') = 1 ORDER BY run_id
"""


class SqliteJournal:
    """A :class:`Journal` in a SQLite file (made if it is not there).

    Runs of several processes may share the file. An entry is on disk before the run goes on
    (write-ahead log, synchronous). The file is open while runs are: there is nothing to close.

    Args:
        path: the file, in a folder that exists, on a disk of this machine.
        busy_s: seconds to wait for another process's write before giving up.
    """

    def __init__(self, path: str | Path, *, busy_s: float = 30.0) -> None:
        self.path = Path(path)
        self._busy_s = busy_s
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._ownership: Ownership | None = None
        self._users = 0

    def __repr__(self) -> str:
        return f"SqliteJournal({str(self.path)!r})"

    def open(self, run_id: str) -> SqliteRunLog:
        """The log of a run, for one writer at a time.

        Raises:
            UserError: the id is empty.
            JournalLockedError: another process, or another run of this one, has it open.
            JournalError: the file cannot be opened, or is no journal.
        """
        if not run_id:
            raise UserError("run_id is empty; give the run a name")
        self._enter()
        try:
            self._claim(run_id)
        except BaseException:
            self._leave()
            raise
        return SqliteRunLog(self, run_id)

    def unfinished(self) -> list[str]:
        """The runs that have begun and not come to their end, those that wait for approval and
        those that are running now included.

        Raises:
            JournalError: the file cannot be read, or is no journal.
        """
        self._enter()
        try:
            return [row[0] for row in self._do(lambda db: db.execute(_UNFINISHED).fetchall())]
        finally:
            self._leave()

    def delete(self, run_id: str) -> None:
        """Forget a run. Raises as :meth:`open`."""
        log = self.open(run_id)
        try:
            self._do(lambda db: db.execute("DELETE FROM entries WHERE run_id = ?", (run_id,)))
        finally:
            log.close()

    # -- the file ------------------------------------------------------------------------------

    def _do(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Do ``work`` in one transaction."""
        with self._lock, self._failing_clearly():
            connection = self._connection
            assert connection is not None
            connection.execute("BEGIN IMMEDIATE")
            try:
                done = work(connection)
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
            return done

    def _enter(self) -> None:
        """Open the file for the first of several users."""
        with self._lock, self._failing_clearly():
            if self._connection is None:
                connection = sqlite3.connect(
                    self.path, timeout=self._busy_s, isolation_level=None, check_same_thread=False
                )
                try:
                    self._prepare(connection)
                    self._ownership = Ownership(self.path)
                except BaseException:
                    connection.close()
                    raise
                self._connection = connection
            self._users += 1

    def _prepare(self, connection: sqlite3.Connection) -> None:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if version != _VERSION and (version or tables):
            raise JournalError(
                f"{self.path}: a SQLite file, but no journal of this version ({_VERSION}); name "
                "another file"
            )
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT;")

    def _leave(self) -> None:
        """Close the file after the last of its users."""
        with self._lock:
            self._users -= 1
            if self._users or self._connection is None or self._ownership is None:
                return
            self._connection.close()
            self._connection = None
            self._ownership.close()
            self._ownership = None

    @contextmanager
    def _failing_clearly(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise JournalError(f"{self.path}: the journal cannot be used: {error}") from error
        except OSError as error:
            raise JournalError(
                f"{self.path}: the journal cannot be locked: {error.strerror or error}"
            ) from error

    # -- runs ----------------------------------------------------------------------------------

    def _claim(self, run_id: str) -> None:
        def claim(db: sqlite3.Connection) -> None:
            assert self._ownership is not None
            row = db.execute("SELECT token, owner FROM owners WHERE run_id = ?", (run_id,))
            held = row.fetchone()
            if held is not None:
                token, owner = held
                if token == self._ownership.token or is_alive(self.path, token):
                    raise JournalLockedError(str(self.path), run_id, owner=owner)
            db.execute(
                "INSERT OR REPLACE INTO owners VALUES (?, ?, ?)",
                (run_id, self._ownership.token, self._ownership.owner),
            )

        self._do(claim)

    def _release(self, run_id: str) -> None:
        try:
            self._do(lambda db: db.execute("DELETE FROM owners WHERE run_id = ?", (run_id,)))
        finally:
            self._leave()


class SqliteRunLog:
    """One run in a :class:`SqliteJournal`: see :class:`~dspark_agent.journal.base.RunLog`."""

    def __init__(self, journal: SqliteJournal, run_id: str) -> None:
        self._journal = journal
        self._run_id = run_id
        self._count = 0
        self._closed = False

    @property
    def where(self) -> str:
        """The file and the run."""
        return f"{self._journal.path}: run {self._run_id!r}"

    def read(self) -> Sequence[str]:
        """All entries, in order."""
        query = "SELECT entry FROM entries WHERE run_id = ? ORDER BY number"
        rows = self._journal._do(lambda db: db.execute(query, (self._run_id,)).fetchall())
        self._count = len(rows)
        return [row[0] for row in rows]

    def append(self, entry: str) -> None:
        """Add an entry; it is on disk once this returns."""
        row = (self._run_id, self._count, entry)
        self._journal._do(lambda db: db.execute("INSERT INTO entries VALUES (?, ?, ?)", row))
        self._count += 1

    def close(self) -> None:
        """Give up the right to write. Idempotent."""
        if not self._closed:
            self._closed = True
            self._journal._release(self._run_id)
