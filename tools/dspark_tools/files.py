"""Tools on files: list, read with line numbers, write, and edit by exact text or by lines."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated

from pydantic import Field

from dspark_agent import FunctionToolset
from dspark_tools.workspace import Workspace, WorkspaceError

LineNumber = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, slots=True)
class Files:
    """The file tools of a workspace. The methods' docstrings are what the model reads.

    Attributes:
        workspace: Where the files are.
        max_entries: Files named by one listing.
        max_lines: Lines shown by one read.
    """

    workspace: Workspace
    max_entries: int = 200
    max_lines: int = 400

    def toolset(self) -> FunctionToolset:
        """All file tools, reading and writing."""
        toolset: FunctionToolset = FunctionToolset(id="files")
        for tool in (
            self.list_files,
            self.read_file,
            self.write_file,
            self.edit_file,
            self.replace_lines,
        ):
            toolset.add(tool)
        return toolset

    def reading_toolset(self) -> FunctionToolset:
        """The file tools that change nothing."""
        return FunctionToolset([self.list_files, self.read_file], id="files-reading")

    def list_files(self, folder: str = ".", pattern: str = "*") -> str:
        """List the files below a folder of the workspace.

        Args:
            folder: The folder, relative to the workspace.
            pattern: Only files whose name matches, such as "*.py".
        """
        entries = [
            entry
            for entry in self.workspace.files(folder)
            if fnmatchcase(entry.name.rpartition("/")[2], pattern)
            or fnmatchcase(entry.name, pattern)
        ]
        if not entries:
            return f"No file below {folder!r} matches {pattern!r}."
        lines = [f"{entry.name} ({entry.size_bytes} bytes)" for entry in entries]
        return _shorten(lines, self.max_entries, "files; give a folder or a pattern")

    def read_file(
        self, path: str, first_line: LineNumber = 1, last_line: LineNumber | None = None
    ) -> str:
        """Read a text file; each line is shown with its number.

        Args:
            path: The file, relative to the workspace.
            first_line: The first line to show.
            last_line: The last line to show; the end of the file when left out.
        """
        lines = self.workspace.read_text(path).splitlines()
        if not lines:
            return f"{path} is empty."
        if first_line > len(lines):
            raise WorkspaceError(f"{path} has {len(lines)} lines; there is no line {first_line}.")
        if last_line is not None and last_line < first_line:
            raise WorkspaceError(f"last_line {last_line} is before first_line {first_line}.")
        shown = number_lines(lines[first_line - 1 : last_line], first_line)
        return _shorten(shown, self.max_lines, "lines; give first_line and last_line")

    def write_file(self, path: str, content: str) -> str:
        """Write a whole file; replaces the file if there is one.

        Args:
            path: The file, relative to the workspace.
            content: All of its text.
        """
        self.workspace.write_text(path, content)
        return f"Wrote {path} ({len(content.splitlines())} lines)."

    def edit_file(self, path: str, old_text: str, new_text: str) -> str:
        """Replace one piece of text in a file.

        Args:
            path: The file, relative to the workspace.
            old_text: The text to replace, exactly as in the file; it must occur once.
            new_text: The text to put in its place.
        """
        text = self.workspace.read_text(path)
        if "\r\n" in text:  # the model reads and writes plain line ends
            old_text, new_text = _with_crlf(old_text), _with_crlf(new_text)
        if not old_text:
            raise WorkspaceError("old_text is empty; give the text to replace.")
        if old_text == new_text:
            raise WorkspaceError("old_text and new_text are the same; the edit changes nothing.")
        places = _occurrences(text, old_text)
        if len(places) != 1:
            raise WorkspaceError(
                _ambiguous(path, places) if places else _missing(path, text, old_text)
            )
        start = places[0]
        changed = text[:start] + new_text + text[start + len(old_text) :]
        self.workspace.write_text(path, changed)
        return _after_edit(path, text, changed)

    def replace_lines(
        self, path: str, first_line: LineNumber, last_line: LineNumber, new_text: str
    ) -> str:
        """Replace lines of a file, by the numbers that read_file shows.

        Args:
            path: The file, relative to the workspace.
            first_line: The first line to replace.
            last_line: The last line to replace; the same as first_line for one line.
            new_text: The lines to put in their place, with their indentation.
        """
        text = self.workspace.read_text(path)
        lines = text.splitlines(keepends=True)
        if not first_line <= last_line <= len(lines):
            raise WorkspaceError(
                f"{path} has {len(lines)} lines; first_line {first_line} to last_line "
                f"{last_line} is not a range of them."
            )
        newline = "\r\n" if "\r\n" in text else "\n"
        fresh = [line + newline for line in new_text.splitlines()]
        changed = "".join([*lines[: first_line - 1], *fresh, *lines[last_line:]])
        if changed == text:
            raise WorkspaceError(
                "new_text is what the lines already are; the edit changes nothing."
            )
        self.workspace.write_text(path, changed)
        return _after_edit(path, text, changed)


def number_lines(lines: Sequence[str], first: int = 1) -> list[str]:
    """Each line with its number before it: ``"12| return x"``, numbers aligned."""
    width = len(str(first + len(lines) - 1))
    return [f"{number:>{width}}| {line}" for number, line in enumerate(lines, first)]


def _shorten(lines: list[str], limit: int, what: str) -> str:
    left_out = len(lines) - limit
    if left_out <= 0:
        return "\n".join(lines)
    return "\n".join([*lines[:limit], f"[{left_out} more {what}]"])


def _with_crlf(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\n", "\r\n")


def _occurrences(text: str, piece: str) -> list[int]:
    """Where ``piece`` starts in ``text``, overlapping occurrences included."""
    places = []
    start = text.find(piece)
    while start >= 0:
        places.append(start)
        start = text.find(piece, start + 1)
    return places


def _ambiguous(path: str, places: Sequence[int]) -> str:
    return (
        f"old_text occurs {len(places)} times in {path}; add the lines before or after it, "
        "so that it occurs once."
    )


def _missing(path: str, text: str, old_text: str) -> str:
    """Says that the text is not there, and shows what comes nearest."""
    wanted = old_text.splitlines()
    lines = text.splitlines()
    if not lines:
        return f"{path} is empty; use write_file."
    span = min(len(wanted), len(lines))
    stripped = [line.strip() for line in wanted]

    def likeness(start: int) -> float:
        there = "\n".join(line.strip() for line in lines[start : start + span])
        return difflib.SequenceMatcher(None, there, "\n".join(stripped), autojunk=False).ratio()

    start = max(range(len(lines) - span + 1), key=likeness)
    near = "\n".join(number_lines(lines[start : start + span], start + 1))
    same_words = [line.strip() for line in lines[start : start + span]] == stripped
    cause = "its spaces differ" if same_words else "the nearest text differs"
    return f"old_text is not in {path}: {cause}. The file has:\n{near}\nCopy it exactly."


def _after_edit(path: str, before: str, after: str) -> str:
    """The changed lines with their new numbers, so that no second read is needed."""
    old, new = before.splitlines(), after.splitlines()
    first = 0
    while first < min(len(old), len(new)) and old[first] == new[first]:
        first += 1
    kept = 0
    while kept < min(len(old), len(new)) - first and old[-1 - kept] == new[-1 - kept]:
        kept += 1
    start, end = max(first - 2, 0), len(new) - kept + 2
    return "\n".join([f"Edited {path}:", *number_lines(new[start:end], start + 1)])
