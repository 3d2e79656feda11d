"""``bench kernels``: its cases are right and its arithmetic is, on tiny shapes; the times mean
nothing under an interpreter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dspark_agent.cli import main
from dspark_backend.bench.errors import BenchError
from dspark_backend.bench.kernel_cases import KernelCase, Size, cases
from dspark_backend.bench.kernels import (
    SIZES,
    KernelsReport,
    KernelsSettings,
    Stopwatch,
    _apart,
    measure,
)
from dspark_backend.bench.table import kernels_table

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TINY = Size(
    hidden=24, intermediate=40, heads=4, kv_heads=2, head_dim=16, vocab=70, requests=2, rows=3,
    context=9, slots=2, drafts=33, rank=8, page=8,
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_kernel_is_checked_against_torch_and_timed(dtype: torch.dtype) -> None:
    seen: list[tuple[int, int]] = []
    stopwatch = Stopwatch(DEVICE, 1)
    bandwidth, rows = measure(TINY, dtype, stopwatch, 2**16, lambda *done: seen.append(done))
    assert seen == [(n, len(rows)) for n in range(1, len(rows) + 1)]
    assert bandwidth > 0.0
    assert [row.op for row in rows] == [case.op for case in cases(TINY, dtype, DEVICE)]
    for row in rows:
        assert row.share == pytest.approx(row.moved_bytes / row.ours_s / bandwidth)
        assert row.moved_bytes > 0 < row.torch_s
        if "coupled" not in row.op and dtype is torch.float32:
            assert row.apart is not None


def test_moved_bytes_count_what_must_be_read_and_written() -> None:
    made = {case.op: case.moved_bytes for case in cases(TINY, torch.bfloat16, DEVICE)}
    rows = 6
    assert made["norm"] == rows * 24 * (4 + 4 + 2 + 2)
    assert made["swiglu"] == rows * 40 * 3 * 2
    assert made["attention, causal"] == 2 * (2 * 2 * 12 * 16 * 2) + 2 * (rows * 4 * 16 * 2)
    assert made["verify, greedy"] == rows * 70 * 2 + rows * 3 * 4
    assert made["markov"] == 2 * 2 * 33 * 2 + 2 * 33 * 8 * 2


def test_a_kernel_that_is_wrong_is_not_timed() -> None:
    (case, *_) = cases(TINY, torch.float32, DEVICE)
    assert isinstance(case, KernelCase)
    right = case.ours
    wrong = replace(case, ours=lambda: right() + 1.0)
    with pytest.raises(BenchError, match=r"norm .* differs from torch by 1"):
        _apart(wrong)
    with pytest.raises(BenchError, match="differs from torch by nan"):
        _apart(replace(case, ours=lambda: right() * torch.nan))


def test_the_table_shows_every_kernel(tmp_path: Path) -> None:
    from rich.console import Console

    from dspark_backend.bench.host import host_facts

    bandwidth, rows = measure(TINY, torch.float32, Stopwatch(DEVICE, 1), 2**16)
    report = KernelsReport(
        host=host_facts(), size="tiny", dtype="float32", copy_bytes_per_s=bandwidth, rows=rows
    )
    assert KernelsReport.model_validate_json(report.model_dump_json()) == report
    console = Console(width=200, record=True)
    console.print(kernels_table(report))
    text = console.export_text()
    assert all(row.op in text for row in rows)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(BenchError, match="unknown size 'huge': choose from "):
        KernelsSettings(size="huge")
    with pytest.raises(BenchError, match="repeats"):
        KernelsSettings(repeats=0)
    assert set(SIZES) == {"qwen2.5-coder-0.5b", "qwen3-4b"}


@pytest.mark.skipif(DEVICE.type == "cuda", reason="there is a GPU")
@pytest.mark.parametrize("command", ["kernels", "decode"])
def test_without_a_gpu_the_command_line_says_so(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--device", "cuda", "--json", str(tmp_path / "report.json")]
    if command == "decode":
        arguments += ["--model", "smollm2-135m"]
    assert main(["bench", command, *arguments]) != 0
    said = capsys.readouterr().err
    assert "error: device 'cuda': torch" in said
    assert "internal" not in said
    assert not (tmp_path / "report.json").exists()
