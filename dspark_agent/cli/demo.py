"""``dspark-agent demo``: a coding agent fixes a bug, step by step, on a model in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from dspark_agent.cli.boundary import UsageError
from dspark_agent.cli.console import err, out, plain
from dspark_agent.cli.model_options import (
    DEFAULT_MODEL,
    ModelOption,
    PrecisionOption,
    ThreadsOption,
    open_model,
)

if TYPE_CHECKING:
    from rich.syntax import Syntax

    from dspark_agent import Model
    from dspark_tools import Report, Workspace
    from dspark_tools.tasks import BugFixTask

DEFAULT_TASK = "average"
NOT_FIXED = 1


def demo(
    task: Annotated[str, typer.Option(help="Which bug; --list names them.")] = DEFAULT_TASK,
    list_tasks: Annotated[
        bool, typer.Option("--list", help="Name the tasks, and do nothing.")
    ] = False,
    model: ModelOption = DEFAULT_MODEL,
    keep: Annotated[
        Path | None,
        typer.Option(help="Folder for the project, new or empty; else it is deleted afterwards."),
    ] = None,
    precision: PrecisionOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Watch a coding agent find and fix a bug with a model that runs here."""
    from dspark_tools.tasks import load_tasks, materialise

    tasks = {known.name: known for known in load_tasks()}
    if list_tasks:
        for known in tasks.values():
            out().print(plain(f"{known.name:<16}{known.instruction}"), soft_wrap=True)
        return
    if task not in tasks:
        raise UsageError(f"no task {task!r}: choose from {', '.join(tasks)}")
    import anyio

    with _folder(keep) as folder:
        workspace = materialise(tasks[task], folder)
        opened = open_model(model, precision=precision, threads=threads)
        fixed = anyio.run(_fix, tasks[task], workspace, opened)
    if not fixed:
        raise typer.Exit(NOT_FIXED)


async def _fix(task: BugFixTask, workspace: Workspace, model: Model) -> bool:
    """Shows the broken project, the steps that mend it, and what came of them."""
    from dspark_agent.cli.latency import latency_table
    from dspark_agent.cli.steps_view import StepsView
    from dspark_tools import Pytest, Snapshot
    from dspark_tools.bugfix import fix_bug

    before = Snapshot.take(workspace)
    # The task's tests need no plugins, and loading those takes longer than running the tests.
    tests = Pytest(workspace, plugins=False)
    out().rule(f"the task: {task.name}", style="note")
    out().print(plain(task.instruction, "bold"))
    for name in before.texts:
        out().print(plain(name, "dim"))
    out().rule("the steps", style="note")
    async with model:
        fix = await fix_bug(
            model, workspace, task.instruction, tests=tests, on_event=StepsView(out())
        )
    out().rule("the change", style="note")
    diff = before.diff(Snapshot.take(workspace))
    out().print(_syntax(diff) if diff else "[bad]nothing was changed[/]")
    out().rule("the tests", style="note")
    report = await tests.report()
    _show_tests(report)
    out().print()
    out().print(latency_table(fix.steps))
    return report.ok


def _show_tests(report: Report) -> None:
    out().print(plain(report.text(), "good" if report.ok else "bad"))


def _syntax(diff: str) -> Syntax:
    from rich.syntax import Syntax

    return Syntax(diff.rstrip("\n"), "diff", background_color="default")


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    """Where the project goes: ``keep``, or a folder that is gone afterwards."""
    if keep is not None:
        yield keep
        err().print(f"[note]the project is in {keep}[/]")
        return
    with TemporaryDirectory(prefix="dspark-demo-") as folder:
        yield Path(folder)
