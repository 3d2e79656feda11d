"""Tool that finds text in the files of a workspace.

Plain text on purpose: a regular expression from a model may take exponential time, and small
models escape them wrongly.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from dspark_agent import FunctionToolset
from dspark_tools.workspace import Workspace, WorkspaceError


@dataclass(frozen=True, slots=True)
class Search:
    """The search tool of a workspace.

    Attributes:
        workspace: Where to search.
        max_matches: Matches shown by one search.
        max_line_chars: Characters shown of one line.
    """

    workspace: Workspace
    max_matches: int = 50
    max_line_chars: int = 200

    def toolset(self) -> FunctionToolset:
        """The search as a toolset."""
        return FunctionToolset([self.search], id="search")

    def search(self, text: str, pattern: str = "*", ignore_case: bool = False) -> str:
        """Find the lines that contain a text, in all files of the workspace.

        Args:
            text: The text to find: plain text within one line, not a regular expression.
            pattern: Only files whose name matches, such as "*.py".
            ignore_case: Whether upper and lower case count as equal.
        """
        if not text.strip() or "\n" in text:
            raise WorkspaceError("text must be part of one line, and not empty.")
        wanted = text.casefold() if ignore_case else text
        matches: list[str] = []
        for entry in self.workspace.files():
            if not fnmatchcase(entry.name.rpartition("/")[2], pattern):
                continue
            if entry.size_bytes > self.workspace.max_file_bytes:
                continue
            for number, line in enumerate(self._lines(entry.name), 1):
                if wanted in (line.casefold() if ignore_case else line):
                    if len(matches) == self.max_matches:
                        return "\n".join([*matches, "[more matches; search for a longer text]"])
                    matches.append(f"{entry.name}:{number}: {line.strip()[: self.max_line_chars]}")
        return "\n".join(matches) or f"No file that matches {pattern!r} contains {text!r}."

    def _lines(self, name: str) -> list[str]:
        try:
            return self.workspace.read_text(name).splitlines()
        except WorkspaceError:
            return []  # binary, unreadable or gone since the listing: nothing to find in it
