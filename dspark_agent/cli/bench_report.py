"""What every ``bench`` command shows while it runs, and the file it leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from dspark_agent.cli.console import err

if TYPE_CHECKING:
    from pydantic import BaseModel

Counted = Callable[[int, int], None]
"""Called as ``(done, to do)``."""


@contextmanager
def counter(what: str) -> Iterator[Counted]:
    """A bar that counts ``what``, drawn from the first report on."""
    bars = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=err()
    )
    tasks: list[TaskID] = []

    def report(done: int, total: int) -> None:
        if not tasks:
            tasks.append(bars.add_task(what))
            bars.start()
        bars.update(tasks[0], completed=done, total=total)

    try:
        yield report
    finally:
        if tasks:
            bars.stop()


def write_report(report: BaseModel, path: Path) -> None:
    """Writes ``report`` as JSON and says so."""
    path.write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
    err().print(f"[note]wrote {path}[/]")
