"""The options that give an agent its tools."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dspark_agent.cli.boundary import UsageError

if TYPE_CHECKING:
    from dspark_agent import FunctionToolset


class ToolGroup(StrEnum):
    """What an agent may do in its workspace."""

    READ = "read"
    EDIT = "edit"
    TESTS = "tests"
    PYTHON = "python"
    SHELL = "shell"
    GIT = "git"


WorkspaceOption = Annotated[
    Path | None,
    typer.Option("--workspace", "-w", exists=True, file_okay=False, help="Folder for the tools."),
]
ToolOption = Annotated[
    list[ToolGroup] | None,
    typer.Option("--tool", "-t", help="Tools to offer; may be repeated. [default: read]"),
]


def chosen_toolsets(
    workspace: Path | None, groups: Sequence[ToolGroup] | None
) -> list[FunctionToolset]:
    """The toolsets that the two options ask for; none without a workspace.

    Raises:
        UsageError: tools are asked for, but no folder that they may touch.
    """
    if workspace is None:
        if groups:
            raise UsageError("--tool needs --workspace: the folder that the tools may touch")
        return []
    return _toolsets(workspace, groups or [ToolGroup.READ])


def harmless_tools(workspace: Path) -> frozenset[str]:
    """The names of the tools that change nothing and run nothing of the workspace's."""
    from dspark_tools import Files, Git, Search, Workspace

    folder = Workspace(workspace)
    sets = (Files(folder).reading_toolset(), Search(folder).toolset(), Git(folder).toolset())
    return frozenset(name for toolset in sets for name in toolset.tools)


def _toolsets(folder: Path, groups: Sequence[ToolGroup]) -> list[FunctionToolset]:
    """The toolsets of ``groups``, each once, in the workspace ``folder``."""
    from dspark_tools import Files, Git, Pytest, Python, Search, Shell, Workspace

    workspace = Workspace(folder)
    made: list[FunctionToolset] = []
    if ToolGroup.EDIT in groups:
        made.append(Files(workspace).toolset())
    elif ToolGroup.READ in groups:
        made.append(Files(workspace).reading_toolset())
    if ToolGroup.READ in groups or ToolGroup.EDIT in groups:
        made.append(Search(workspace).toolset())
    if ToolGroup.TESTS in groups:
        made.append(Pytest(workspace).toolset())
    if ToolGroup.PYTHON in groups:
        made.append(Python(workspace).toolset())
    if ToolGroup.SHELL in groups:
        made.append(Shell(workspace).toolset())
    if ToolGroup.GIT in groups:
        made.append(Git(workspace).toolset())
    return made
