"""A workspace cannot be left: by name, by link, or by swapping folders for links meanwhile."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_tools.workspace import Workspace, WorkspaceError


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "secret.txt").write_text("secret")
    return folder


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    root = tmp_path / "project"
    (root / "src").mkdir(parents=True)
    (root / "src" / "calc.py").write_text("x = 1\n")
    return Workspace(root)


def test_reads_and_writes_text(workspace: Workspace) -> None:
    workspace.write_text("src/deep/new.py", "y = 2\n")

    assert workspace.read_text("./src//deep/new.py") == "y = 2\n"
    assert [entry.name for entry in workspace.files()] == ["src/calc.py", "src/deep/new.py"]
    assert [entry.size_bytes for entry in workspace.files("src/deep")] == [6]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../outside/secret.txt", r"'\.\.'"),
        ("src/../../outside/secret.txt", r"'\.\.'"),
        ("src/..", r"'\.\.'"),
        ("/etc/passwd", "outside the workspace"),
        ("~/secret.txt", "outside the workspace"),
        ("", "not a file name"),
        ("  ", "not a file name"),
        ("a\0b", "not a file name"),
        (".", "workspace itself"),
        ("src", "is a folder"),
        ("src/calc.py/x", "file as a folder"),
        ("missing.py", "does not exist"),
        ("x" * 300, "too long"),
    ],
)
def test_unusable_names_are_explained(workspace: Workspace, name: str, reason: str) -> None:
    with pytest.raises(WorkspaceError, match=reason):
        workspace.read_text(name)


@pytest.mark.parametrize("name", ["../new.txt", "/tmp/new.txt", "src/../../new.txt", "src", "."])
def test_nothing_is_written_outside(workspace: Workspace, name: str) -> None:
    before = sorted(workspace.root.parent.rglob("*"))

    with pytest.raises(WorkspaceError):
        workspace.write_text(name, "x")

    assert sorted(workspace.root.parent.rglob("*")) == before


def test_absolute_names_below_the_root_are_refused_too(workspace: Workspace) -> None:
    with pytest.raises(WorkspaceError, match="relative to its root"):
        workspace.read_text(str(workspace.root / "src" / "calc.py"))


def test_links_to_files_are_not_followed(workspace: Workspace, outside: Path) -> None:
    (workspace.root / "link.txt").symlink_to(outside / "secret.txt")

    with pytest.raises(WorkspaceError, match="symbolic link"):
        workspace.read_text("link.txt")
    with pytest.raises(WorkspaceError, match="symbolic link"):
        workspace.write_text("link.txt", "changed")
    assert (outside / "secret.txt").read_text() == "secret"


def test_links_to_folders_are_not_followed(workspace: Workspace, outside: Path) -> None:
    (workspace.root / "link").symlink_to(outside)

    with pytest.raises(WorkspaceError, match="symbolic link"):
        workspace.read_text("link/secret.txt")
    with pytest.raises(WorkspaceError, match="symbolic link"):
        workspace.write_text("link/new.txt", "x")
    with pytest.raises(WorkspaceError, match="symbolic link"):
        workspace.files("link")
    assert [entry.name for entry in workspace.files()] == ["src/calc.py"]
    assert not (outside / "new.txt").exists()


def test_dangling_links_do_not_create_their_target(workspace: Workspace, outside: Path) -> None:
    (workspace.root / "link.txt").symlink_to(outside / "new.txt")

    with pytest.raises(WorkspaceError, match="symbolic link"):
        workspace.write_text("link.txt", "x")
    assert not (outside / "new.txt").exists()


def swap_before(
    call: str, name: str, target: Path, link_to: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rival puts a link in the place of ``target`` right before ``os.call`` acts on ``name``:
    after any check that came earlier."""
    real = getattr(os, call)

    def rival(path: str, *args: Any, **kwargs: Any) -> Any:
        if path == name or (args and args[0] == name):
            target.rename(target.parent.parent / "attic")
            target.symlink_to(link_to)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, call, rival)


def test_folder_swapped_for_a_link_at_the_last_moment(
    workspace: Workspace, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (outside / "calc.py").write_text("secret")
    swap_before("open", "src", workspace.root / "src", outside, monkeypatch)

    with pytest.raises(WorkspaceError, match="symbolic link"):
        workspace.read_text("src/calc.py")


def test_folder_swapped_for_a_link_while_writing(
    workspace: Workspace, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swap_before("open", "src", workspace.root / "src", outside, monkeypatch)

    with pytest.raises(WorkspaceError, match="symbolic link"):
        workspace.write_text("src/calc.py", "x = 2\n")
    assert [path.name for path in outside.iterdir()] == ["secret.txt"]


def test_file_swapped_for_a_link_at_the_last_moment(
    workspace: Workspace, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = workspace.root / "src" / "calc.py"
    swap_before("open", "calc.py", file, outside / "secret.txt", monkeypatch)

    with pytest.raises(WorkspaceError, match="symbolic link"):
        workspace.read_text("src/calc.py")


def test_file_swapped_for_a_link_while_writing(
    workspace: Workspace, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = workspace.root / "src" / "calc.py"
    swap_before("replace", "calc.py", file, outside / "secret.txt", monkeypatch)

    workspace.write_text("src/calc.py", "x = 2\n")

    assert (outside / "secret.txt").read_text() == "secret"
    assert not file.is_symlink()
    assert file.read_text() == "x = 2\n"


def test_named_pipes_do_not_block(workspace: Workspace) -> None:
    os.mkfifo(workspace.root / "pipe")

    with pytest.raises(WorkspaceError, match="not a regular file"):
        workspace.read_text("pipe")
    assert "pipe" not in {entry.name for entry in workspace.files()}


def test_large_and_binary_files_are_refused(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path, max_file_bytes=100)
    (tmp_path / "large.txt").write_text("x" * 101)
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff")

    with pytest.raises(WorkspaceError, match="larger than the 100 bytes"):
        workspace.read_text("large.txt")
    with pytest.raises(WorkspaceError, match="larger than the 100 bytes"):
        workspace.write_text("new.txt", "é" * 51)
    with pytest.raises(WorkspaceError, match=r"not UTF-8 text \(byte 0\)"):
        workspace.read_text("image.png")
    assert not (tmp_path / "new.txt").exists()


def test_text_that_is_no_unicode_is_refused(workspace: Workspace) -> None:
    with pytest.raises(WorkspaceError, match="position 1"):
        workspace.write_text("new.txt", "a\ud800")


def test_replacing_keeps_the_mode_and_leaves_no_other_file(workspace: Workspace) -> None:
    script = workspace.root / "run.sh"
    script.write_text("old")
    script.chmod(0o750)

    workspace.write_text("run.sh", "new")

    assert (script.read_text(), script.stat().st_mode & 0o777) == ("new", 0o750)
    assert sorted(path.name for path in workspace.root.iterdir()) == ["run.sh", "src"]


def test_git_folder_is_neither_listed_nor_written(workspace: Workspace) -> None:
    (workspace.root / ".git").mkdir()
    (workspace.root / ".git" / "config").write_text("[core]\n")

    with pytest.raises(WorkspaceError, match="belongs to git"):
        workspace.write_text(".git/hooks/pre-commit", "x")
    assert [entry.name for entry in workspace.files()] == ["src/calc.py"]


def test_root_must_be_a_folder(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError, match="existing folder"):
        Workspace(tmp_path / "missing")


def test_link_as_root_is_followed_once(tmp_path: Path, workspace: Workspace) -> None:
    (tmp_path / "link").symlink_to(workspace.root)

    assert Workspace(tmp_path / "link").read_text("src/calc.py") == "x = 1\n"


NAMES = st.lists(
    st.sampled_from(["..", ".", "", "src", "link", "calc.py", "secret.txt", "~", "outside", "\0"]),
    max_size=6,
).map("/".join)


@given(name=NAMES)
def test_no_name_reads_the_secret(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    top = tmp_path_factory.mktemp("attack")
    (top / "outside").mkdir()
    (top / "outside" / "secret.txt").write_text("secret")
    (top / "project" / "src").mkdir(parents=True)
    (top / "project" / "link").symlink_to(top / "outside")
    (top / "project" / "src" / "link").symlink_to("../../outside")
    workspace = Workspace(top / "project")

    for name_ in (name, f"{top}/{name}", f"/{name}"):
        with pytest.raises(WorkspaceError):
            workspace.read_text(name_)
