"""run_python, run_shell and git_diff: what they print is what the model reads."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from dspark_tools.git import Git
from dspark_tools.process import ProcessLimits
from dspark_tools.python import Python
from dspark_tools.shell import Shell
from dspark_tools.workspace import Workspace

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.parametrize("anyio_backend", ["asyncio"]),  # test_process.py has both
]


async def test_python_sees_the_modules_of_the_workspace(tmp_path: Path) -> None:
    (tmp_path / "calc.py").write_text("def add(a, b):\n    return a + b\n")

    text = await Python(Workspace(tmp_path)).run_python("import calc\nprint(calc.add(1, 2))")

    assert text == "3\n[exit status 0]"
    assert [path.name for path in tmp_path.iterdir()] == ["calc.py"]


async def test_python_traceback_shows_the_source(tmp_path: Path) -> None:
    text = await Python(Workspace(tmp_path)).run_python("x = 1\nprint(x / 0)\n")

    assert 'File "program.py", line 2' in text
    assert "print(x / 0)" in text
    assert text.endswith("ZeroDivisionError: division by zero\n[exit status 1]")


async def test_shell_works_in_the_workspace(tmp_path: Path) -> None:
    text = await Shell(Workspace(tmp_path)).run_shell("echo hi > a.txt; cat a.txt; exit 4")

    assert text == "hi\n[exit status 4]"


async def test_shell_is_stopped_with_its_background_jobs(tmp_path: Path) -> None:
    shell = Shell(Workspace(tmp_path), ProcessLimits(timeout_s=30))

    text = await shell.run_shell("sleep 600 & echo started")

    assert text == "started\n[exit status 0]"


async def test_diff_without_a_repository_counts_from_the_start(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\ny = 2\n")
    (tmp_path / "old.py").write_text("gone\n")
    git = Git(Workspace(tmp_path))
    assert await git.git_diff() == "Nothing changed."

    (tmp_path / "a.py").write_text("x = 1\ny = 3")
    (tmp_path / "old.py").unlink()
    (tmp_path / "new.py").write_text("z\n")

    assert await git.git_diff() == (
        "--- a/a.py\n+++ b/a.py\n@@ -1,2 +1,2 @@\n x = 1\n-y = 2\n+y = 3\n"
        "\\ No newline at end of file\n"
        "--- /dev/null\n+++ b/new.py\n@@ -0,0 +1 @@\n+z\n"
        "--- a/old.py\n+++ /dev/null\n@@ -1 +0,0 @@\n-gone\n"
    )


def run_git(folder: Path, *arguments: str) -> None:
    settings = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *settings, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    run_git(tmp_path, "init")
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / ".gitignore").write_text("*.log\n")
    return tmp_path


async def test_diff_of_a_repository_is_against_the_last_commit(repository: Path) -> None:
    run_git(repository, "add", ".")
    run_git(repository, "commit", "-m", "first")
    git = Git(Workspace(repository))
    assert await git.git_diff() == "Nothing changed."

    (repository / "a.py").write_text("x = 2\n")
    (repository / "new.py").write_text("z\n")
    (repository / "noise.log").write_text("z\n")
    diff = await git.git_diff()

    assert "-x = 1\n+x = 2\n" in diff
    assert diff.endswith("--- /dev/null\n+++ b/new.py\n@@ -0,0 +1 @@\n+z\n")
    assert "noise" not in diff


async def test_diff_of_a_subfolder_leaves_out_the_rest(repository: Path) -> None:
    (repository / "sub").mkdir()
    (repository / "sub" / "b.py").write_text("y = 1\n")
    run_git(repository, "add", ".")
    run_git(repository, "commit", "-m", "first")
    (repository / "a.py").write_text("x = 2\n")
    (repository / "sub" / "b.py").write_text("y = 2\n")

    diff = await Git(Workspace(repository / "sub")).git_diff()

    assert "+y = 2" in diff
    assert "x = 2" not in diff
    assert "+++ b/b.py" in diff


async def test_diff_of_a_repository_without_commits(repository: Path) -> None:
    diff = await Git(Workspace(repository)).git_diff()

    assert "+x = 1" in diff


async def test_repository_settings_start_no_programs(repository: Path) -> None:
    run_git(repository, "add", ".")
    run_git(repository, "commit", "-m", "first")
    for key in ("diff.external", "core.fsmonitor", "core.pager"):
        run_git(repository, "config", key, f"touch {repository}/started; true")
    (repository / "a.py").write_text("x = 2\n")

    diff = await Git(Workspace(repository)).git_diff()

    assert "+x = 2" in diff
    assert not (repository / "started").exists()
