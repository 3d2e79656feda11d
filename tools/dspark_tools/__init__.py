"""Ready-made tools for agents: files, search, tests, Python, shell and git diff, in a workspace."""

from __future__ import annotations

from dspark_tools.files import Files
from dspark_tools.git import Git, Snapshot
from dspark_tools.process import ProcessLimits, ProcessResult, run_process
from dspark_tools.python import Python
from dspark_tools.search import Search
from dspark_tools.shell import Shell
from dspark_tools.tests import Failure, Pytest, Report
from dspark_tools.workspace import FileEntry, Workspace, WorkspaceError

__all__ = [
    "Failure",
    "FileEntry",
    "Files",
    "Git",
    "ProcessLimits",
    "ProcessResult",
    "Pytest",
    "Python",
    "Report",
    "Search",
    "Shell",
    "Snapshot",
    "Workspace",
    "WorkspaceError",
    "run_process",
]
