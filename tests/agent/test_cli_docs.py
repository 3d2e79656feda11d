"""The README and the documents are true: their Python runs on the real small model, their shell
commands are the command line's, their links lead somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer

from dspark_agent.cli.app import GlobalOptions, build_app

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "AGENTS.md", *sorted((ROOT / "docs").glob("*.md"))]
SMALL = "smollm2-135m"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^    (dspark-agent .*)$", re.MULTILINE)


def blocks(page: Path, language: str) -> list[str]:
    return [code for name, code in FENCE.findall(page.read_text()) if name == language]


SNIPPETS = [
    pytest.param(code, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, code in enumerate(blocks(page, "python"), start=1)
]
COMMANDS = [
    command.strip()
    for page in PAGES
    for block in [*blocks(page, "console"), *INDENTED.findall(page.read_text())]
    for line in block.splitlines()
    for command in line.split("&&")
    if command.strip().startswith("dspark-agent")
]


@pytest.mark.real_model
@pytest.mark.parametrize("code", SNIPPETS)
def test_python_runs_on_the_small_model(code: str, tmp_path: Path) -> None:
    for name in ("qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"):
        code = code.replace(name, SMALL)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_shell_commands_are_the_command_lines(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parses the command with every option checked, and stops before it does anything."""
    group = typer.main.get_command(build_app(GlobalOptions()))
    arguments = shlex.split(command)[1:]
    context = group.make_context("dspark-agent", arguments)
    while hasattr(group, "resolve_command"):
        rest = [*context._protected_args, *context.args]
        name, group, rest = group.resolve_command(context, rest)
        assert group is not None
        context = group.make_context(name, rest, parent=context)


def test_every_command_is_shown_somewhere() -> None:
    app = build_app(GlobalOptions())
    known = {entry.name for entry in [*app.registered_commands, *app.registered_groups]}
    assert {shlex.split(command)[1] for command in COMMANDS} == known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        there = target.startswith("https://") or (page.parent / target).exists()
        assert there, f"{page.name} links to {target}"


def test_the_install_commands_name_extras_that_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    shown = [re.findall(r"'\.\[([\w,]+)\]'", page.read_text()) for page in PAGES]
    extras = {extra for found in shown for group in found for extra in group.split(",")}
    assert extras == set(project["optional-dependencies"])


def test_every_feature_is_shown_by_a_test_of_that_name() -> None:
    rows = re.findall(r"^\| [^|]+ \| (.*?) \|", (ROOT / "docs" / "features.md").read_text(), re.M)
    shown = [row for row in rows if row not in ("here", "---")]
    assert len(shown) >= 40
    for row in shown:
        link = re.fullmatch(r"\[([\w ]+)\]\(\.\./(tests/[\w/]+\.py)\)", row)
        assert link, row
        name = f"test_{link[1].replace(' ', '_')}"
        assert re.search(rf"def {name}\(", (ROOT / link[2]).read_text()), name


def test_every_dependency_is_pinned() -> None:
    def name(requirement: str) -> str:
        return re.split(r"[<>=~!;\[ ]", requirement, maxsplit=1)[0].lower().replace("_", "-")

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"]]
    for extra in project["optional-dependencies"].values():
        wanted += extra
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {name(line) for line in lines if line and not line.startswith("#")}
    assert {name(requirement) for requirement in wanted} <= pinned
    assert all("==" in line for line in lines if line and not line.startswith("#"))
    assert "torch==2.13.0" in lines
