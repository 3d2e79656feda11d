"""``dspark-agent demo``: the bug, the steps, the diff, the tests and the table."""

from __future__ import annotations

from pathlib import Path

import pytest

from dspark_agent import FunctionModel, ModelMessage, ModelTurn, ToolCallPart
from dspark_agent.cli import demo as demo_command
from dspark_agent.cli import main
from dspark_tools import Report
from dspark_tools.bugfix import BugFix

GOOD = "def average(values):\n    return sum(values) / len(values)"
BAD = "def average(values):\n    return 0"


def coder(code: str) -> FunctionModel:
    """A model that calls the one tool it is offered, and writes ``code`` when asked for code."""

    def answer(messages: list[ModelMessage], turn: ModelTurn) -> ToolCallPart:
        name = turn.tools[0].name
        args = {
            "run_tests": {},
            "read_file": {"path": "stats.py", "first_line": 1, "last_line": 400},
            "rewrite_function": {"path": "stats.py", "code": code},
        }
        return ToolCallPart(tool_name=name, args=args[name])

    return FunctionModel(answer)


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


def test_the_demo_shows_the_whole_story(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(demo_command, "open_model", lambda *_names, **_options: coder(GOOD))
    folder = tmp_path / "project"
    assert main(["demo", "--keep", str(folder)]) == 0
    shown = capsys.readouterr().out
    told = [
        "The average of 1 and 2 comes out as 1",
        "-> run_tests",
        "1 failed, 2 passed.",
        "-> read_file",
        "-> rewrite_function",
        "All 3 tests passed.",
        "-    return sum(values) // len(values)",
        "+    return sum(values) / len(values)",
        "where the time went",
        "3 rewrite_function",
    ]
    assert [text for text in told if text not in shown] == [], shown
    places = [shown.find(text) for text in told]
    assert places == sorted(places)
    assert "/ len(values)" in (folder / "stats.py").read_text()


def test_a_demo_that_fails_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def hopeless(*_: object, **__: object) -> object:
        report = Report(passed=2, failures=(), skipped=0, problem="no", seconds=0.0)
        return BugFix(fixed=False, rounds=1, report=report, steps=())

    monkeypatch.setattr(demo_command, "open_model", lambda *_names, **_options: coder(BAD))
    monkeypatch.setattr("dspark_tools.bugfix.fix_bug", hopeless)
    assert main(["demo"]) == demo_command.NOT_FIXED
    shown = capsys.readouterr().out
    assert "nothing was changed" in shown
    assert "1 failed, 2 passed." in shown


def test_the_tasks_can_be_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--list"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) >= 12
    assert any(line.startswith("average ") for line in shown)


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--task", "no-such-bug"]) == 2
    assert "no task 'no-such-bug': choose from" in capsys.readouterr().err
    (tmp_path / "stats.py").write_text("mine")
    assert main(["demo", "--keep", str(tmp_path)]) == 2
    assert "stats.py exists" in capsys.readouterr().err
    assert (tmp_path / "stats.py").read_text() == "mine"


@pytest.mark.slow
def test_the_demo_fixes_its_bug_with_the_default_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo"]) == 0
    assert "All 3 tests passed." in capsys.readouterr().out
