"""File tools: what they show, what they change, and what they answer to bad arguments."""

from __future__ import annotations

from pathlib import Path

import pytest

from dspark_tools.files import Files
from dspark_tools.workspace import Workspace, WorkspaceError

CALC = '''def add(a, b):
    """Sum."""
    return a - b


def double(a):
    return a - b
'''


@pytest.fixture
def files(tmp_path: Path) -> Files:
    (tmp_path / "calc.py").write_text(CALC)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "notes.txt").write_text("one\ntwo\n")
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "calc.pyc").write_bytes(b"\0")
    return Files(Workspace(tmp_path))


def text(files: Files, name: str = "calc.py") -> str:
    return files.workspace.read_text(name)


def test_list_names_files_and_leaves_out_caches(files: Files) -> None:
    assert files.list_files() == "calc.py (81 bytes)\ndocs/notes.txt (8 bytes)"
    assert files.list_files("docs") == "docs/notes.txt (8 bytes)"
    assert files.list_files(pattern="*.py") == "calc.py (81 bytes)"
    assert files.list_files(pattern="docs/*") == "docs/notes.txt (8 bytes)"
    assert files.list_files(pattern="*.rs") == "No file below '.' matches '*.rs'."


def test_long_list_is_cut_with_a_hint(files: Files) -> None:
    short = Files(files.workspace, max_entries=1)

    assert short.list_files() == "calc.py (81 bytes)\n[1 more files; give a folder or a pattern]"


def test_read_numbers_the_lines(files: Files) -> None:
    assert files.read_file("docs/notes.txt") == "1| one\n2| two"
    assert files.read_file("calc.py", 3, 4) == "3|     return a - b\n4| "
    assert files.read_file("calc.py", first_line=7) == "7|     return a - b"


def test_long_read_is_cut_with_a_hint(files: Files) -> None:
    short = Files(files.workspace, max_lines=1)

    assert short.read_file("docs/notes.txt") == (
        "1| one\n[1 more lines; give first_line and last_line]"
    )


@pytest.mark.parametrize(
    ("first", "last", "reason"), [(8, None, "has 7 lines; there is no line 8"), (3, 2, "is before")]
)
def test_read_explains_wrong_ranges(
    files: Files, first: int, last: int | None, reason: str
) -> None:
    with pytest.raises(WorkspaceError, match=reason):
        files.read_file("calc.py", first, last)


def test_write_replaces_the_file(files: Files) -> None:
    assert files.write_file("docs/notes.txt", "three\n") == "Wrote docs/notes.txt (1 lines)."
    assert text(files, "docs/notes.txt") == "three\n"


def test_edit_changes_the_one_place_and_shows_it(files: Files) -> None:
    shown = files.edit_file(
        "calc.py", "double(a):\n    return a - b", "double(a):\n    return 2 * a"
    )

    assert text(files) == CALC.replace("a):\n    return a - b", "a):\n    return 2 * a")
    assert shown == "Edited calc.py:\n5| \n6| def double(a):\n7|     return 2 * a"


def test_edit_refuses_text_that_occurs_twice(files: Files) -> None:
    with pytest.raises(WorkspaceError, match=r"occurs 2 times in calc\.py"):
        files.edit_file("calc.py", "return a - b", "return a + b")
    assert text(files) == CALC


def test_edit_shows_the_nearest_text_when_it_is_missing(files: Files) -> None:
    with pytest.raises(WorkspaceError) as caught:
        files.edit_file("calc.py", "def dubble(a):", "def double(x):")

    assert "the nearest text differs" in str(caught.value)
    assert "6| def double(a):" in str(caught.value)


def test_edit_tells_when_only_spaces_differ(files: Files) -> None:
    with pytest.raises(
        WorkspaceError, match=r"its spaces differ.*\n6\| def double.*\n7\|     return"
    ):
        files.edit_file("calc.py", "def double(a):\n  return a - b", "x")


@pytest.mark.parametrize(("old", "new", "reason"), [("", "x", "empty"), ("a", "a", "same")])
def test_edit_refuses_edits_that_are_none(files: Files, old: str, new: str, reason: str) -> None:
    with pytest.raises(WorkspaceError, match=reason):
        files.edit_file("calc.py", old, new)


def test_edit_of_an_empty_file_names_the_other_tool(files: Files) -> None:
    files.write_file("empty.py", "")

    with pytest.raises(WorkspaceError, match="use write_file"):
        files.edit_file("empty.py", "x", "y")
    assert files.read_file("empty.py") == "empty.py is empty."


def test_replace_lines(files: Files) -> None:
    shown = files.replace_lines("calc.py", 3, 4, "    result = a + b\n    return result\n")

    assert text(files).splitlines()[2:5] == ["    result = a + b", "    return result", ""]
    assert shown.splitlines()[3:5] == ["3|     result = a + b", "4|     return result"]


def test_replace_lines_can_delete(files: Files) -> None:
    files.replace_lines("calc.py", 4, 7, "")

    assert text(files) == "".join(CALC.splitlines(keepends=True)[:3])


@pytest.mark.parametrize(("first", "last"), [(8, 8), (3, 2), (7, 8)])
def test_replace_lines_explains_wrong_ranges(files: Files, first: int, last: int) -> None:
    with pytest.raises(WorkspaceError, match="has 7 lines"):
        files.replace_lines("calc.py", first, last, "x")


def test_replace_lines_by_themselves_is_refused(files: Files) -> None:
    with pytest.raises(WorkspaceError, match="changes nothing"):
        files.replace_lines("calc.py", 3, 3, "    return a - b")


def test_windows_line_ends_are_kept(files: Files, tmp_path: Path) -> None:
    (tmp_path / "dos.txt").write_bytes(b"one\r\ntwo\r\nthree\r\n")

    files.edit_file("dos.txt", "one\ntwo", "1\n2")
    files.replace_lines("dos.txt", 3, 3, "3")

    assert (tmp_path / "dos.txt").read_bytes() == b"1\r\n2\r\n3\r\n"


def test_toolsets_name_the_tools(files: Files) -> None:
    assert list(files.toolset().tools) == [
        "list_files",
        "read_file",
        "write_file",
        "edit_file",
        "replace_lines",
    ]
    assert list(files.reading_toolset().tools) == ["list_files", "read_file"]
