"""``dspark-agent bench pareto``: report, tables and plot, and mistakes in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dspark_agent.cli import main

Checkpoint = Callable[..., Path]


def test_pareto_writes_json_tables_and_a_plot(
    tiny_checkpoint: Checkpoint, talk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report, plot = tmp_path / "pareto.json", tmp_path / "curve.png"
    arguments = ["--model", str(tiny_checkpoint("qwen3")), "--trace", str(talk), "--threads", "1"]
    arguments += ["--concurrency", "1,2", "--contender", "step_aware", "--rounds", "1"]
    arguments += ["--json", str(report), "--png", str(plot)]
    assert main(["bench", "pareto", *arguments]) == 0
    document = json.loads(report.read_text())
    assert list(document["contenders"]) == ["plain", "step_aware"]
    assert document["concurrency"] == [1, 2]
    assert plot.read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr()
    assert "2 agents" in shown.out
    assert "matched throughput" in shown.out
    assert "curve.png" in shown.err.replace("\n", "")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--concurrency", "1,many"], "'1,many' is not a list of numbers"),
        (["--concurrency", "0"], "agents must be from 1 to 64, not 0"),
        (["--contender", "wishful"], "there is no policy 'wishful'"),
        (["--trace", "no-such-trace"], "none ships by that name (coding"),
    ],
    ids=["words", "nobody", "policy", "trace"],
)
def test_a_mistake_is_one_line_and_leaves_no_report(
    arguments: list[str],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["bench", "pareto", "--model", "smollm2-135m", "--json", "r.json", *arguments]
    assert main(command) == 2
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert complaint in shown
    assert list(tmp_path.iterdir()) == []
