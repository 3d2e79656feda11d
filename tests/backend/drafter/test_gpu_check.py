"""The command that checks a GPU: its logic, and its checks on a tiny model, without one."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dspark_backend.bench import gpu_check
from dspark_backend.bench.gpu import checks, rates
from dspark_backend.bench.gpu.stages import (
    CheckFailedError,
    Ending,
    Facts,
    GpuReport,
    Stage,
    markdown,
    run_stages,
)
from dspark_backend.bench.host import host_facts
from dspark_backend.catalog import resolve
from dspark_backend.checkpoint.config import TargetConfig
from dspark_backend.drafter.checkpoint import write_drafter
from dspark_backend.kernels.recording import Capture
from dspark_backend.target.device_load import load_device_decoder

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def passing(left_s: float) -> Facts:
    return {"left_s": left_s}


def failing(left_s: float) -> Facts:
    raise CheckFailedError("two | bits\ndiffer")


def dying(left_s: float) -> Facts:
    raise RuntimeError("out of memory")


def endless(left_s: float) -> Facts:
    time.sleep(60)
    return {}


class Clock:
    """Every look at it moves it on by a second."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def test_a_stage_that_fails_or_dies_keeps_no_other_from_running() -> None:
    seen: list[str] = []
    stages = [Stage("a", failing), Stage("b", dying), Stage("c", passing)]
    reports = run_stages(stages, 100.0, on_stage=lambda report: seen.append(report.name))
    assert [r.ending for r in reports] == [Ending.FAILED, Ending.BROKEN, Ending.PASSED]
    assert [r.said for r in reports[:2]] == ["two | bits\ndiffer", "RuntimeError: out of memory"]
    assert seen == ["a", "b", "c"]


def test_what_there_is_no_time_for_is_said_to_be_skipped() -> None:
    reports = run_stages([Stage(n, passing) for n in "abc"], 4.0, clock=Clock())
    assert [r.ending for r in reports] == [Ending.PASSED, Ending.PASSED, Ending.SKIPPED]
    assert reports[0].facts["left_s"] == 3.0
    assert "the 4 s of the check were over" in reports[2].said
    assert not GpuReport(host=host_facts(), stages=reports).passed


def test_a_stage_that_takes_all_the_time_is_ended() -> None:
    (report,) = run_stages([Stage("long", endless)], 0.2)
    assert report.ending is Ending.BROKEN
    assert "TimeoutError: not over after" in report.said


def test_the_report_is_a_line_a_stage_and_a_table_of_figures() -> None:
    stages = run_stages([Stage("first", failing), Stage("second", lambda left_s: FACTS)], 9.0)
    text = markdown(GpuReport(host=host_facts(), stages=stages))
    assert "| first | failed | 0.0 | two \\| bits differ |" in text
    assert "| tok_per_s | 123.5 |" in text
    assert "| who | ours/theirs |\n|---|---|\n| ours | None |\n| theirs | 1.25 |" in text
    assert "no GPU; " in text


FACTS: Facts = {
    "tok_per_s": 123.456,
    "rows": [{"who": "ours", "ours/theirs": None}, {"who": "theirs", "ours/theirs": 1.25}],
}


@pytest.fixture(scope="module")
def trial(
    make_drafter: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> checks.Trial:
    random = make_drafter("qwen3", draft_vocab=200)
    folder = tmp_path_factory.mktemp("drafter") / "drafter"
    write_drafter(folder, random.config, random.state, random.d2t)
    files = resolve(str(random.target_folder))
    prompts = [tuple(range(5, 14)), tuple(range(30, 37))]
    return checks.Trial(files, folder, DEVICE, prompts, tokens=6, kv_bytes=2**24)


@pytest.mark.slow
def test_the_checks_hold_on_a_tiny_model(trial: checks.Trial, capture: Capture | None) -> None:
    assert checks.as_on_the_cpu(trial) == {"texts": 2, "tokens": 12}
    assert checks.in_any_company(trial, "fp32")["coupled"] == 12
    assert checks.with_and_without_speculation(trial, "fp32")["rejection"] == 12
    assert checks.bits_of_a_row(trial)["rows"] == [{"rows compared": 2}]
    replayed = checks.recorded_steps(trial, "fp32", capture)["rows"]
    assert [row["steps"] for row in replayed] == [
        *("greedy, 0 drafts", "coupled, 0 drafts", "coupled, cut and penalised, 0 drafts"),
        "greedy, 3 drafts",
    ]
    assert all(row["hits"] > row["recorded"] > 0 for row in replayed)
    ahead = checks.steps_ahead(trial, "fp32", capture)["rows"]
    assert [row["steps"] for row in ahead] == [
        *("greedy, 0 drafts", "coupled, 0 drafts", "greedy, 3 drafts")
    ]
    assert all(row[f"{kind}_s"] > 0 for row in ahead for kind in ("synchronous", "ahead"))
    assert checks.never_waits(DEVICE, vocab=70) == {"vocabulary": 70}


@pytest.mark.slow
def test_guided_steps_run_ahead_on_a_tiny_model(
    trial: checks.Trial, capture: Capture | None
) -> None:
    rows = checks.guided_steps_ahead(replace(trial, tokens=13), "fp32", capture)["rows"]
    assert [row["steps"] for row in rows] == ["coupled, 3 drafts", "coupled, 0 drafts"]


def test_a_check_says_where_texts_part(
    trial: checks.Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = checks.Trial.texts

    def wrong(self: checks.Trial, *given: Any, together: bool, drafts: int = 0) -> Any:
        first, second = right(self, *given, together=together, drafts=drafts)
        return [first, (*second[:2], -1, *second[3:])] if together else [first, second]

    monkeypatch.setattr(checks.Trial, "texts", wrong)
    with pytest.raises(CheckFailedError, match=r"text 1 parts at token 2 of 6: alone .* together"):
        checks.in_any_company(trial, "fp32")
    with pytest.raises(CheckFailedError, match="no drafter ships"):
        checks.with_and_without_speculation(replace(trial, drafter=None))


def test_rates_are_of_a_decoder_of_the_right_size(trial: checks.Trial) -> None:
    raw = {**trial.files.config.raw, "num_hidden_layers": 2}
    config = TargetConfig.from_dict(raw)
    decoder = rates.random_decoder(config, torch.bfloat16, 64, DEVICE)
    real = load_device_decoder(trial.files, torch.bfloat16, 64, DEVICE)
    for ours, theirs in zip(decoder.weights.layers, real.weights.layers, strict=False):
        for name in ("qkv", "output", "gate_up", "down"):
            assert getattr(ours, name).weight.shape == getattr(theirs, name).weight.shape
    layer = 64 * (64 + 64) + 64 * 64 + 64 * 256 + 128 * 64
    assert rates.weight_bytes(decoder) == 2 * (2 * layer + 512 * 64)
    facts = rates.plain_rate(decoder, 4, 5000, copy_bytes_per_s=1e9)
    assert facts["share_of_bandwidth"] == pytest.approx(5000 * facts["tok_per_s"] / 1e9)
    gaps = rates.host_gaps(decoder, DEVICE, 1)  # without a GPU, all of a pass is the host's
    assert gaps["gap_share"] == pytest.approx(1 - gaps["busy_s"] / gaps["wall_s"])
    assert (gaps["busy_s"] > 0.0) is (DEVICE.type == "cuda")
    assert TargetConfig.from_dict(rates.QWEN3_4B).num_layers == 36


def test_every_stage_has_a_name_of_its_own() -> None:
    names = [stage.name for stage in gpu_check.stages_of("cuda", DEVICE, gpu_check.MODELS)]
    assert len(names) == len(set(names))
    assert "qwen2.5-coder-0.5b: decode, speculation off" in names


def test_native_tests_say_what_failed(tmp_path: Path) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    for folder, claim in ((good, "True"), (bad, "False")):
        folder.mkdir()
        (folder / "test_it.py").write_text(f"def test_it():\n    assert {claim}\n")
    assert "1 passed" in gpu_check.native_tests([str(good)], 120.0)["said"]
    with pytest.raises(CheckFailedError, match="1 failed"):
        gpu_check.native_tests([str(bad)], 120.0)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 2
    assert "error: device 'cuda': torch" in capsys.readouterr().err
    assert gpu_check.main(["--device", "cpu", "--out", str(tmp_path / "out")]) == 2
    assert "a GPU is checked, not the CPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_both_files_are_written(tmp_path: Path) -> None:
    stages = run_stages([Stage("one", passing)], 9.0)
    report = GpuReport(host=host_facts(), stages=stages)
    gpu_check.write(report, tmp_path)
    assert json.loads((tmp_path / "gpu-check.json").read_text())["stages"][0]["name"] == "one"
    assert "| one | passed |" in (tmp_path / "gpu-check.md").read_text()
