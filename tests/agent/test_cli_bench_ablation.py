"""``dspark-agent bench ablation``: report and table, and mistakes in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dspark_agent.cli import main

Checkpoint = Callable[..., Path]


def test_ablation_writes_json_and_a_table(
    tiny_checkpoint: Checkpoint, talk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "ablation.json"
    arguments = ["--model", str(tiny_checkpoint("qwen3")), "--trace", str(talk), "--threads", "1"]
    arguments += ["--agents", "2", "--rounds", "1", "--signal", "splice", "--json", str(report)]
    assert main(["bench", "ablation", *arguments]) == 0
    document = json.loads(report.read_text())
    assert document["agents"] == 2
    assert list(document["contenders"]) == ["plain", "all", "without splice"]
    assert "against all" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--signal", "luck"], "there is no signal 'luck'"),
        (["--agents", "65"], "agents must be from 1 to 64, not 65"),
        (["--trace", "no-such-trace"], "none ships by that name (coding"),
    ],
    ids=["signal", "agents", "trace"],
)
def test_a_mistake_is_one_line_and_leaves_no_report(
    arguments: list[str],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["bench", "ablation", "--model", "smollm2-135m", "--json", "r.json", *arguments]
    assert main(command) == 2
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert complaint in shown
    assert list(tmp_path.iterdir()) == []
