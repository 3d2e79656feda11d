"""The search tool finds plain text, within its limits."""

from __future__ import annotations

from pathlib import Path

import pytest

from dspark_tools.search import Search
from dspark_tools.workspace import Workspace, WorkspaceError


@pytest.fixture
def search(tmp_path: Path) -> Search:
    (tmp_path / "a.py").write_text("x = f(1)\n    y = F(2)\n")
    (tmp_path / "b.txt").write_text("f(3)\n")
    (tmp_path / "c.bin").write_bytes(b"f(\xff")
    return Search(Workspace(tmp_path))


def test_matches_have_file_and_line(search: Search) -> None:
    assert search.search("f(") == "a.py:1: x = f(1)\nb.txt:1: f(3)"
    assert search.search("f(", pattern="*.py") == "a.py:1: x = f(1)"
    assert search.search("f(", "*.py", ignore_case=True) == "a.py:1: x = f(1)\na.py:2: y = F(2)"
    assert search.search("zzz") == "No file that matches '*' contains 'zzz'."


def test_many_matches_are_cut(search: Search) -> None:
    few = Search(search.workspace, max_matches=1, max_line_chars=3)

    assert few.search("f(") == "a.py:1: x =\n[more matches; search for a longer text]"


@pytest.mark.parametrize("text", ["", "  ", "a\nb"])
def test_unusable_text_is_explained(search: Search, text: str) -> None:
    with pytest.raises(WorkspaceError, match="part of one line"):
        search.search(text)
