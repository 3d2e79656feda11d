"""Bars for the work on model files that takes a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from dspark_agent.cli.console import err

if TYPE_CHECKING:
    from dspark_backend.catalog import Progress as Report
    from dspark_backend.catalog import ProgressSink


@contextmanager
def model_bars() -> Iterator[ProgressSink]:
    """A progress sink that draws a bar per model and stage.

    Nothing is drawn until something is reported, so a model from the cache leaves no trace. The
    bars stay on the screen when the work is done.
    """
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=err(),
    )
    tasks: dict[tuple[str, str], TaskID] = {}

    def report(progress: Report) -> None:
        key = (progress.model, progress.stage.value)
        total = progress.total_bytes or None
        if not tasks:
            bars.start()
        if key not in tasks:
            tasks[key] = bars.add_task(f"{progress.stage.value} {progress.model}", total=total)
        bars.update(tasks[key], completed=progress.done_bytes, total=total)

    try:
        yield report
    finally:
        if tasks:
            bars.stop()
