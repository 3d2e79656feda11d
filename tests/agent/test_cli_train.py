"""``train`` and ``eval`` end to end on a tiny model, as a user would run them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from dspark_agent.cli.eval import evaluate
from dspark_agent.cli.train import train


@pytest.fixture(scope="module")
def cli() -> typer.Typer:
    app = typer.Typer()
    app.command("train")(train)
    app.command("eval")(evaluate)
    return app


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    lines = [{"messages": [{"role": "user", "content": f"Count to {i}"}]} for i in range(60)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_a_drafter_is_trained_then_judged(
    cli: typer.Typer, prompts: Path, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    model = str(tiny_checkpoint("llama", num_hidden_layers=4))
    common = ["--model", model, "--prompts", str(prompts), "--max-answer", "12", "--threads", "1"]
    small = ["--answer-tokens", "100", "--held-out-tokens", "60", "--held-out", "0.3"]
    size = ["--layers", "1", "--block-size", "2", "--rank", "4", "--taps", "0,1", "--head", "rnn"]
    run = ["--steps", "2", "--sequences", "2", "--anchors", "3", "--draft-vocab", "100"]
    run += ["--cross-entropy", "0.5"]
    out = tmp_path / "run"
    done = CliRunner().invoke(
        cli, ["train", *common, *small, *size, *run, "--out", str(out), "--storage", "int8"]
    )
    assert done.exit_code == 0, done.output
    assert "accepted length" in done.output
    config = json.loads((out / "drafter" / "config.json").read_text())
    assert (config["block_size"], config["target_layer_ids"]) == (2, [0, 1])
    assert (config["markov_head_type"], config["draft_vocab_size"]) == ("rnn", 100)
    state = json.loads((out / "state" / "state.json").read_text())
    assert state["settings"]["loss"]["cross_entropy"] == 0.5

    report = tmp_path / "report" / "eval.json"
    which = ["--drafter", str(out / "drafter"), "--json", str(report), "--held-out", "0.3"]
    judged = CliRunner().invoke(cli, ["eval", *common, *which, "--answer-tokens", "40"])
    assert judged.exit_code == 0, judged.output
    assert set(json.loads(report.read_text())["by_temperature"]) == {"0", "1"}
    plots = {path.name for path in report.parent.glob("*.png")}
    assert plots == {"eval-acceptance.png", "eval-reliability-0.png", "eval-reliability-1.png"}


def test_a_drafter_to_go_on_from_settles_the_shape(
    cli: typer.Typer, prompts: Path, tmp_path: Path
) -> None:
    rest = ["--model", "m", "--prompts", str(prompts), "--out", str(tmp_path / "run")]
    start = ["--start", str(tmp_path)]
    done = CliRunner().invoke(cli, ["train", *rest, *start, "--block-size", "5"])
    assert done.exit_code == 2
    assert "--block-size" in done.output
    assert "--start" in done.output


def test_taps_that_are_no_numbers_are_refused(cli: typer.Typer, prompts: Path) -> None:
    done = CliRunner().invoke(
        cli, ["train", "-m", "x", "--prompts", str(prompts), "--out", "o", "--taps", "two"]
    )
    assert done.exit_code == 2
    assert "layer numbers" in done.output
