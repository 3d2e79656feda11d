"""``dspark-agent bench``: the report goes to the file, the table to the terminal."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from dspark_agent.cli import main

Checkpoint = Callable[..., Path]


def test_decode_writes_json_and_a_table(
    tiny_checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, report = tmp_path / "prompts.jsonl", tmp_path / "decode.json"
    prompts.write_text('{"turns": ["Hello"]}\n{"turns": ["there"]}\n')
    arguments = ["--model", str(tiny_checkpoint("qwen3")), "--prompts", str(prompts)]
    arguments += ["--max-new-tokens", "4", "--threads", "1", "--precision", "bf16"]
    assert main(["bench", "decode", *arguments, "--limit", "1", "--json", str(report)]) == 0
    document = json.loads(report.read_text())
    assert document["max_new_tokens"] == 4
    assert document["threads"] == 1
    assert len(document["runs"]) == 1
    shown = capsys.readouterr()
    assert "tok/s" in shown.out
    assert "bf16" in shown.out
    assert "decode.json" in shown.err.replace("\n", "")


def test_quality_writes_json_and_a_table(
    tiny_checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "quality.json"
    arguments = ["--model", str(tiny_checkpoint("llama")), "--precision", "bf16", "--tokens", "32"]
    assert main(["bench", "quality", *arguments, "--threads", "1", "--json", str(report)]) == 0
    document = json.loads(report.read_text())
    assert document["tokens"] == 31
    assert document["relative_change"] == 0.0
    assert "perplexity" in capsys.readouterr().out


def test_cost_writes_json_a_table_and_a_plot(
    tiny_checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "cost.json"
    arguments = [
        "--model",
        str(tiny_checkpoint("llama")),
        "--precision",
        "bf16",
        "--seconds",
        "0.1",
    ]
    assert main(["bench", "cost", *arguments, "--threads", "1", "--json", str(report)]) == 0
    document = json.loads(report.read_text())
    table = document["table"]
    assert table["rows"][0] == 1
    assert len(table["verify_s"]) == len(table["rows"])
    assert table["conditions"]["threads"] == 1
    assert all(check["predicted_s"] > 0 < check["measured_s"] for check in document["checks"])
    shown = capsys.readouterr()
    assert "16 rows" in shown.out
    assert "a further request" in shown.out
    width, height = struct.unpack(">II", (tmp_path / "cost.png").read_bytes()[16:24])
    assert (width, height) == (640, 480)


def test_simulate_writes_json_and_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records, report = tmp_path / "cycles.jsonl", tmp_path / "simulate.json"
    records.write_text(
        '{"kind": "tool_call", "context": 40, "tokens": 3,'
        ' "cycles": [{"position": 0, "survival": [0.9, 0.8], "accepted": 2}]}\n'
    )
    arguments = ["--records", str(records), "--curve", "two-core-cpu", "--json", str(report)]
    arguments += ["--agents", "1", "--agents", "4", "--policy", "plain", "--policy", "step_aware"]
    assert main(["bench", "simulate", *arguments]) == 0
    document = json.loads(report.read_text())
    assert [(each["agents"], each["policy"]) for each in document["results"]] == [
        (1, "plain"),
        (1, "step_aware"),
        (4, "plain"),
        (4, "step_aware"),
    ]
    assert document["results"][1]["accepted_length"] == 3.0
    shown = capsys.readouterr()
    assert "assumed, not measured" in shown.out
    assert "step_aware" in shown.out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--curve", "h300-like"], "none ships by that name (h200-like, two-core-cpu)"),
        (["--policy", "wishful"], "there is no policy 'wishful'"),
        (["--agents", "513"], "equal to 512"),
    ],
    ids=["curve", "policy", "agents"],
)
def test_a_mistake_in_a_simulation_is_one_line(
    arguments: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "r.json"
    assert main(["bench", "simulate", *arguments, "--json", str(report)]) == 2
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert complaint in shown
    assert not report.exists()


def test_overhead_writes_json_and_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "overhead.json"
    arguments = ["--steps", "20", "--rounds", "2", "--json", str(report)]
    assert main(["bench", "overhead", *arguments]) == 0
    document = json.loads(report.read_text())
    assert document["settings"] == {"steps": 20, "rounds": 2}
    assert set(document["kinds"]) == {"text", "typed", "tool", "thread_tool", "events"}
    for kind in document["kinds"].values():
        assert kind["count"] == 40
        assert 0 < kind["median_s"] <= kind["p95_s"]
        assert kind["growth"] == pytest.approx(kind["last_s"] / kind["first_s"])
    shown = capsys.readouterr()
    assert "growth" in shown.out
    assert "thread_tool" in shown.out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["decode", "--prompts", "no-such-set"], "no-such-set: no such file"),
        (["decode", "--drafter", "."], "only with speculation on"),
        (["steps", "--trace", "no-such-trace"], "none ships by that name (coding"),
        (["quality", "--text", "no-such-text"], "no-such-text"),
        (["quality", "--precision", "int3"], "int3"),
        (["cost", "--precision", "int3"], "int3"),
    ],
    ids=["prompts", "drafter", "trace", "text", "precision", "cost"],
)
def test_a_mistake_is_one_line_and_leaves_no_report(
    arguments: list[str],
    complaint: str,
    tiny_checkpoint: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    model = str(tiny_checkpoint("llama"))
    assert main(["bench", *arguments, "--model", model, "--json", "r.json"]) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert complaint in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "r.json").exists()


def test_a_report_that_cannot_be_written_is_told_before_measuring(
    tiny_checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(tiny_checkpoint("llama"))
    target = str(tmp_path / "no-such-folder" / "r.json")
    assert main(["bench", "decode", "--model", model, "--json", target]) == 2
    assert "no-such-folder" in capsys.readouterr().err.replace("\n", "")
