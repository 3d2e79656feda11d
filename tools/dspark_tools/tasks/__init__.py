"""Small bug-fix tasks: a module with one bug, its tests, and what a user would ask for.

Each is one TOML file beside this one. They are what the demo shows, what the success rate of a
model is counted over, and a start for one's own.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from dspark_tools.workspace import Workspace


class ReferenceFix(BaseModel):
    """One way to remove the bug: ``old``, which occurs once in ``file``, becomes ``new``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    old: str
    new: str


class BugFixTask(BaseModel):
    """A tiny project with one bug.

    Attributes:
        name: Name of the task.
        instruction: What a user would ask for, in one sentence.
        bug: The kind of bug, for tables.
        files: The project: text by file name. The tests fail because of the bug.
        fix: The reference solution; never shown to the model.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    instruction: str
    bug: str
    files: Mapping[str, str]
    fix: ReferenceFix


def load_tasks() -> tuple[BugFixTask, ...]:
    """All tasks that come with the package, by name."""
    found = [
        BugFixTask(name=entry.name.removesuffix(".toml"), **tomllib.loads(entry.read_text("utf-8")))
        for entry in resources.files(__name__).iterdir()
        if entry.name.endswith(".toml")
    ]
    return tuple(sorted(found, key=lambda task: task.name))


def load_task(name: str) -> BugFixTask:
    """The task with that name.

    Raises:
        KeyError: There is none; the message lists those there are.
    """
    tasks = {task.name: task for task in load_tasks()}
    if name not in tasks:
        raise KeyError(f"no bug-fix task {name!r}; there are: {', '.join(tasks)}")
    return tasks[name]


def materialise(task: BugFixTask, folder: str | Path) -> Workspace:
    """Writes the task's project into ``folder``, which is made if missing.

    Raises:
        FileExistsError: One of the project's files is already there; nothing was written.
    """
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    for name in task.files:
        if (root / name).exists():
            raise FileExistsError(f"{root / name} exists; give an empty folder")
    workspace = Workspace(root)
    for name, text in task.files.items():
        workspace.write_text(name, text)
    return workspace


__all__ = ["BugFixTask", "ReferenceFix", "load_task", "load_tasks", "materialise"]
