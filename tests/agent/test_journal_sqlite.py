"""The SQLite journal: on disk at once, one writer for each run, and clear about what it is not."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dspark_agent import Agent, Journal, JournalError, JournalLockedError, SqliteJournal, TestModel
from dspark_agent.journal.base import RunLog
from dspark_agent.journal.ownership import Ownership, is_alive

BEGUN = '{"kind": "run-begun"}'
ENDED = '{"kind": "run-ended"}'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs.sqlite"


def test_it_is_a_journal(path: Path) -> None:
    journal: Journal = SqliteJournal(path)
    log: RunLog = journal.open("r")
    log.close()
    assert repr(journal) == f"SqliteJournal({str(path)!r})"


def test_entries_come_back_in_order_and_run_by_run(path: Path) -> None:
    journal = SqliteJournal(path)
    one, two = journal.open("one"), journal.open("two")
    for number in range(12):
        one.append(f'{{"n": {number}}}')
        two.append(f'{{"n": {-number}}}')
    one.close()
    two.close()
    again = SqliteJournal(path).open("one")
    assert again.read() == [f'{{"n": {number}}}' for number in range(12)]
    again.append("{}")
    assert len(again.read()) == 13
    again.close()


def test_an_entry_is_seen_by_others_as_soon_as_it_is_appended(path: Path) -> None:
    log = SqliteJournal(path).open("r")
    log.read()
    log.append(BEGUN)
    with sqlite3.connect(path) as other:
        assert other.execute("SELECT entry FROM entries").fetchall() == [(BEGUN,)]
        assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    other.close()
    log.close()


def test_unfinished_runs_are_those_that_began_and_did_not_end(path: Path) -> None:
    journal = SqliteJournal(path)
    for run_id, entries in {"c": [BEGUN], "a": [BEGUN, ENDED], "b": [BEGUN], "d": []}.items():
        log = journal.open(run_id)
        for entry in entries:
            log.append(entry)
        log.close()
    assert journal.unfinished() == ["b", "c"]
    journal.delete("b")
    assert journal.unfinished() == ["c"]


def test_nothing_stays_open_after_the_last_run(path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    journal = SqliteJournal(path)
    logs = [journal.open(str(number)) for number in range(20)]
    assert len(set(os.listdir("/proc/self/fd")) - before) < 8  # one file for all of them
    for log in logs:
        log.close()
        log.close()
    assert set(os.listdir("/proc/self/fd")) == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("same", [True, False], ids=["one journal", "two journals"])
def test_a_second_writer_is_refused_and_told_who_has_it(path: Path, same: bool) -> None:
    journal = SqliteJournal(path)
    other = journal if same else SqliteJournal(path)
    log = journal.open("r")
    with pytest.raises(JournalLockedError) as caught:
        other.open("r")
    assert (caught.value.path, caught.value.run_id) == (str(path), "r")
    assert f"process {os.getpid()} on " in caught.value.owner
    for says in (str(path), "'r'", caught.value.owner):
        assert says in str(caught.value)
    other.open("another").close()
    log.close()
    other.open("r").close()


HOLDER = """
import sys
from dspark_agent import SqliteJournal
log = SqliteJournal(sys.argv[1]).open("r")
log.append('{"kind": "run-begun"}')
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that is writing run r."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def test_another_process_is_refused_until_the_first_one_dies(
    path: Path, holder: subprocess.Popen[str]
) -> None:
    journal = SqliteJournal(path)
    with pytest.raises(JournalLockedError, match=f"process {holder.pid} on "):
        journal.open("r")
    assert journal.unfinished() == ["r"]  # reading is free
    journal.open("another").close()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    log = journal.open("r")
    assert log.read() == [BEGUN]
    log.close()
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_dead_owner_is_told_from_a_live_one(tmp_path: Path) -> None:
    journal = tmp_path / "j"
    owner = Ownership(journal)
    assert is_alive(journal, owner.token)
    owner.close()
    assert not is_alive(journal, owner.token)
    assert not is_alive(journal, "never")
    (tmp_path / "j.dead.lock").touch()  # what a killed process leaves
    assert not is_alive(journal, "dead")
    assert list(tmp_path.iterdir()) == []


def test_threads_write_at_the_same_time(path: Path) -> None:
    journal = SqliteJournal(path)

    def write(run_id: str) -> None:
        log = journal.open(run_id)
        log.read()
        for number in range(20):
            log.append(str(number))
        log.close()

    threads = [threading.Thread(target=write, args=(str(n),)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for run_id in map(str, range(8)):
        log = journal.open(run_id)
        assert log.read() == [str(number) for number in range(20)]
        log.close()


def test_files_that_are_no_journals(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("Not a database, but long enough to be looked at as one." * 20)
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE birds (name TEXT)")
    db.close()
    newer = tmp_path / "newer.sqlite"
    with sqlite3.connect(newer) as db:
        db.execute("PRAGMA user_version = 9")
    db.close()
    for path, says in (
        (text, "not a database"),
        (other, "no journal of this version"),
        (newer, "no journal of this version"),
        (tmp_path / "no" / "folder.sqlite", "unable to open"),
        (tmp_path, "unable to open"),
    ):
        with pytest.raises(JournalError, match=says) as caught:
            SqliteJournal(path).open("r")
        assert str(path) in str(caught.value)
    with sqlite3.connect(other) as db:
        assert db.execute("SELECT name FROM sqlite_master").fetchall() == [("birds",)]
    db.close()


def test_entries_of_another_version_are_refused_with_their_number(path: Path) -> None:
    journal = SqliteJournal(path)
    agent = Agent(TestModel())
    agent.run_sync("Go", journal=journal, run_id="r")
    with sqlite3.connect(path) as db:
        db.execute('UPDATE entries SET entry = \'{"kind": "dream"}\' WHERE number = 2')
    db.close()
    with pytest.raises(JournalError, match=r"run 'r': entry 3 is not one that this version reads"):
        agent.run_sync("Go", journal=journal, run_id="r")


def test_a_journal_that_is_busy_for_too_long(path: Path) -> None:
    SqliteJournal(path).open("r").close()
    with sqlite3.connect(path, isolation_level=None) as db:
        db.execute("BEGIN IMMEDIATE")
        with pytest.raises(JournalError, match="database is locked"):
            SqliteJournal(path, busy_s=0.05).open("r")
        db.execute("ROLLBACK")
    db.close()


def test_a_write_that_fails_says_where_and_leaves_the_journal_usable(path: Path) -> None:
    journal = SqliteJournal(path)
    log = journal.open("r")
    with sqlite3.connect(path) as db:
        db.execute("ALTER TABLE entries RENAME TO hidden")
        db.commit()
        with pytest.raises(JournalError, match=r"runs\.sqlite: .* no such table"):
            log.append(BEGUN)
        db.execute("ALTER TABLE hidden RENAME TO entries")
    db.close()
    log.append(BEGUN)
    assert log.read() == [BEGUN]
    log.close()
