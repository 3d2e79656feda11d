"""Tool that shows what changed in a workspace: by git where there is a repository, else against
a snapshot."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field

from dspark_agent import FunctionToolset
from dspark_tools.process import ProcessLimits, ProcessResult, run_process
from dspark_tools.workspace import Workspace, WorkspaceError

_EMPTY_TREE = "4b825dc642cb6eb9a060e54bf8d69288fbee4904"
"""git's name for a tree without files: what a repository without commits is compared with."""

_ENVIRONMENT = {
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_OPTIONAL_LOCKS": "0",
}

_LIMITS = ProcessLimits(timeout_s=30.0)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The text files of a workspace at one moment, to compare with later.

    Files that are not text, or larger than the workspace's limit, are not part of it.
    """

    texts: Mapping[str, str]

    @classmethod
    def take(cls, workspace: Workspace) -> Snapshot:
        """Reads all text files of the workspace."""
        texts: dict[str, str] = {}
        for entry in workspace.files():
            try:
                texts[entry.name] = workspace.read_text(entry.name)
            except WorkspaceError:
                continue  # binary or too large: not something a text diff can show
        return cls(texts)

    def diff(self, later: Snapshot) -> str:
        """A unified diff from this snapshot to ``later``; empty when nothing changed."""
        names = sorted({*self.texts, *later.texts})
        return "".join(unified_diff(n, self.texts.get(n), later.texts.get(n)) for n in names)


@dataclass(frozen=True, slots=True)
class Git:
    """The diff tool of a workspace.

    Outside a repository, changes are counted from the moment this object was made.
    """

    workspace: Workspace
    limits: ProcessLimits = _LIMITS
    _start: Snapshot | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        root = self.workspace.root
        tracked = any((folder / ".git").exists() for folder in (root, *root.parents))
        object.__setattr__(self, "_start", None if tracked else Snapshot.take(self.workspace))

    def toolset(self) -> FunctionToolset:
        """The diff tool as a toolset."""
        return FunctionToolset([self.git_diff], id="git")

    async def git_diff(self) -> str:
        """Show all changes in the workspace as a unified diff, new files included."""
        if self._start is not None:
            diff = self._start.diff(Snapshot.take(self.workspace))
        else:
            diff = await self._tracked_changes() + await self._new_files()
        return diff or "Nothing changed."

    async def _tracked_changes(self) -> str:
        head = await self._git("rev-parse", "--verify", "--quiet", "HEAD")
        base = "HEAD" if head.status == 0 else _EMPTY_TREE
        return await self._output(
            "diff", "--no-ext-diff", "--no-textconv", "--no-color", "--relative", base, "--", "."
        )

    async def _new_files(self) -> str:
        listed = await self._output("ls-files", "--others", "--exclude-standard", "-z")
        diffs: list[str] = []
        for name in listed.split("\0"):
            if name:
                try:
                    diffs.append(unified_diff(name, None, self.workspace.read_text(name)))
                except WorkspaceError as error:
                    diffs.append(f"[new file not shown: {error}]\n")
        return "".join(diffs)

    async def _output(self, *arguments: str) -> str:
        result = await self._git(*arguments)
        if result.status != 0:
            raise WorkspaceError(f"git {arguments[0]} did not work: {result.text()}")
        return result.output

    async def _git(self, *arguments: str) -> ProcessResult:
        # The repository's own settings must not start programs of their own choosing.
        command = ["git", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null"]
        command += ["--no-pager", *arguments]
        return await run_process(
            command, folder=self.workspace.root, limits=self.limits, environment=_ENVIRONMENT
        )


def unified_diff(name: str, before: str | None, after: str | None) -> str:
    """The change of one file as a unified diff; None stands for no file. Empty if unchanged."""
    old = (before or "").splitlines(keepends=True)
    new = (after or "").splitlines(keepends=True)
    lines = difflib.unified_diff(
        old,
        new,
        "/dev/null" if before is None else f"a/{name}",
        "/dev/null" if after is None else f"b/{name}",
    )
    return "".join(
        line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines
    )
