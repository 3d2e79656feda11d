"""A drafter on disk is judged by its target; a misplaced one is noticed; plots are PNG files."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dspark_backend.catalog import ModelFiles
from dspark_backend.drafter.checkpoint import write_drafter
from dspark_backend.drafter.model import DraftModel
from dspark_backend.training.chart import write_acceptance, write_reliability
from dspark_backend.training.drafter_check import placement
from dspark_backend.training.evaluation_run import EvalConfig, run_eval
from dspark_backend.training.features import DecoderFeatures, Example
from dspark_backend.training.rollout import Rollout, RolloutConfig


def test_a_run_reports_both_temperatures_and_finds_its_rollouts_again(
    tiny_files: ModelFiles, draft_model: Callable[..., DraftModel], tmp_path: Path
) -> None:
    model = draft_model("vanilla")
    write_drafter(tmp_path / "d", model.config, model.state_dict(), None)
    prompts = tmp_path / "p.jsonl"
    lines = [{"messages": [{"role": "user", "content": f"Say {i}"}]} for i in range(8)]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    config = EvalConfig(
        model=str(tiny_files.folder),
        drafter=tmp_path / "d",
        prompts=prompts,
        work=tmp_path / "work",
        held_out=1.0,
        rollout=RolloutConfig(max_answer_tokens=12),
        precision="int8",
        threads=1,
    )
    stages: list[str] = []
    report = run_eval(config, stages.append)
    assert set(report.by_temperature) == {"0", "1"}
    assert len(stages) == 4
    for evaluation in report.by_temperature.values():
        assert evaluation.overall.rollouts > 0
        assert 1.0 <= evaluation.overall.accepted_length <= 5.0
    before = {path.name: path.read_bytes() for path in config.work.iterdir()}
    assert run_eval(config) == report
    assert {path.name: path.read_bytes() for path in config.work.iterdir()} == before


@pytest.mark.parametrize(("shift", "complains"), [(0, False), (1, True), (-1, True)])
def test_slots_trained_for_another_place_are_noticed(
    shift: int,
    complains: bool,
    draft_model: Callable[..., DraftModel],
    decoder_features: Callable[..., DecoderFeatures],
    rollouts: list[Rollout],
) -> None:
    model = draft_model("none")
    example = decoder_features().example(rollouts[11])
    drafts = {}

    def fake(m: DraftModel, e: Example, d2t: object) -> tuple[np.ndarray, np.ndarray]:
        tokens = e.tokens.tolist()
        places = [min(e.first + 1 + row + shift, len(tokens) - 1) for row in range(30)]
        drafts["made"] = [tokens[place] for place in places]
        return np.array(drafts["made"])[:, None], np.zeros((30, 1))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dspark_backend.training.drafter_check.draft_everywhere", fake)
        found = placement(model, [example], None)
    assert (found.complaint is not None) == complains
    if complains:
        assert f"{shift:+d} places" in str(found.complaint)


def png_pixels(path: Path) -> np.ndarray:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, packed, size = 8, b"", (0, 0)
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + length]
        (checksum,) = struct.unpack(">I", data[at + 8 + length : at + 12 + length])
        assert checksum == zlib.crc32(kind + body)
        if kind == b"IHDR":
            size = struct.unpack(">II", body[:8])
        packed += body if kind == b"IDAT" else b""
        at += 12 + length
    width, height = size
    rows = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(height, 1 + 3 * width)
    return rows[:, 1:].reshape(height, width, 3)


def test_plots_are_png_files_with_a_colour_for_each_series(tmp_path: Path) -> None:
    write_reliability([[(0.1, 0.2, 5), (0.9, 0.8, 9)], [(0.5, 0.5, 3)]], tmp_path / "r.png")
    write_acceptance({"t 0": [0.7, 0.5, 0.4], "t 1": [0.0, 1.0, 0.3]}, tmp_path / "a.png")
    for name in ("r.png", "a.png"):
        colours = {tuple(c) for c in png_pixels(tmp_path / name).reshape(-1, 3).tolist()}
        assert {(31, 119, 180), (255, 127, 14)} <= colours


def test_a_mark_lies_where_its_value_is(tmp_path: Path) -> None:
    write_acceptance({"t 0": [0.0], "t 1": [1.0]}, tmp_path / "a.png")
    pixels = png_pixels(tmp_path / "a.png")
    low = np.argwhere((pixels == (31, 119, 180)).all(axis=-1))
    high = np.argwhere((pixels == (255, 127, 14)).all(axis=-1))
    marks = [rows[rows[:, 1] < 500] for rows in (low, high)]
    assert marks[0][:, 0].min() > marks[1][:, 0].max() + 300
    assert marks[0][:, 1].mean() == marks[1][:, 1].mean()
