"""``dspark-agent models`` on a cache of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from dspark_agent.cli import main
from dspark_agent.cli.console import err
from dspark_agent.cli.progress import model_bars


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DSPARK_AGENT_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def test_list_shows_what_could_be_fetched(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "list"]) == 0
    shown = capsys.readouterr()
    for name in ("smollm2-135m", "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"):
        assert name in shown.out
    assert "98.4 MB" in shown.out
    assert "Apache-2.0" in shown.out


def test_pull_and_rm_of_a_model_that_does_not_exist(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("pull", "rm"):
        assert main(["models", command, "no-such-model"]) == 2
        shown = capsys.readouterr().err
        assert "error:" in shown
        assert "no-such-model" in shown
        assert "qwen2.5-coder-0.5b" in shown


def test_pull_of_a_local_folder_reads_it(
    home: Path, tiny_checkpoint: object, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(tiny_checkpoint)
    folder = tiny_checkpoint("llama")
    assert main(["models", "pull", str(folder)]) == 0
    assert "is ready" in capsys.readouterr().out


def test_rm_of_nothing_frees_nothing(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "rm", "smollm2-135m"]) == 0
    assert "freed 0 bytes" in capsys.readouterr().out


def test_a_bar_is_drawn_once_something_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dspark_backend.catalog import Progress, Stage

    with model_bars():
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(err(), "_force_terminal", True)
    with model_bars() as bars:
        bars(Progress("tiny", Stage.FETCH, 10, 100))
        bars(Progress("tiny", Stage.CONVERT, 0, 0))
        bars(Progress("tiny", Stage.FETCH, 100, 100))
    shown = capsys.readouterr().err
    assert "fetch tiny" in shown
    assert "convert tiny" in shown
    assert "100/100 bytes" in shown
