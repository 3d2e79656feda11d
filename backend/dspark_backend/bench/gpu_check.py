"""``python -m dspark_backend.bench.gpu_check``: all that a GPU is to be checked and measured for,
in one command of at most ten minutes, with the tables as JSON and Markdown."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from dspark_backend.bench.errors import BenchError
from dspark_backend.bench.gpu import checks, rates
from dspark_backend.bench.gpu.stages import (
    CheckFailedError,
    Facts,
    GpuReport,
    Stage,
    StageReport,
    markdown,
    run_stages,
)
from dspark_backend.bench.host import host_facts
from dspark_backend.bench.jsonl import shipped
from dspark_backend.bench.kernels import Stopwatch, copy_bandwidth
from dspark_backend.bench.lineup import Subject
from dspark_backend.bench.prompt import read_prompts
from dspark_backend.checkpoint.config import TargetConfig
from dspark_backend.devices import gpu
from dspark_backend.drafter.shipped import shipped_drafter
from dspark_backend.errors import BackendError
from dspark_backend.kernels.recording import Recordings
from dspark_backend.target.graphs import GraphedDecoder

LIMIT_S = 570.0
MODELS = ("smollm2-135m", "qwen2.5-coder-0.5b")
_TESTS = ("tests/backend/kernels", "tests/backend/device")
_PROMPTS = 4
_TOKENS = 48


def trial_of(model: str, device: torch.device) -> checks.Trial:
    """The shipped code prompts on ``model``. Raises BackendError where it cannot be had."""
    subject = Subject.of(model)
    rows = read_prompts(shipped("prompts", "code"), _PROMPTS)
    prompts = [tuple(subject.dialect.render_start(row.chat(), list(row.tools))) for row in rows]
    drafter = shipped_drafter(subject.files.name)
    return checks.Trial(subject.files, drafter, device, prompts, _TOKENS)


def native_tests(folders: Sequence[str], left_s: float) -> Facts:
    """The tests of the kernels and of what runs on them, natively, where there is a checkout.

    Raises CheckFailedError where one fails or they take too long."""
    present = [folder for folder in folders if Path(folder).is_dir()]
    if not present:
        raise BenchError(f"no {' or '.join(folders)} here: run this from a checkout")
    command = [sys.executable, "-m", "pytest", "-q", "-x", *present]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=left_s / 2)
    except subprocess.TimeoutExpired as error:
        raise CheckFailedError(f"not over after {left_s / 2:.0f} s") from error
    last = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode:
        raise CheckFailedError(f"{last}\n{done.stdout[-2000:]}{done.stderr[-1000:]}")
    return {"said": last}


def four_billion(device: torch.device, left_s: float) -> Facts:
    """A 4B Qwen3-shaped model with random weights: its rate, its gaps, its share of bandwidth;
    launched kernel by kernel, and replayed as CUDA graphs."""
    copy = copy_bandwidth(2**30, Stopwatch(device, 20))
    config = TargetConfig.from_dict(rates.QWEN3_4B)
    decoder = rates.random_decoder(config, torch.bfloat16, 1024, device)
    read = rates.weight_bytes(decoder)
    rows = [
        {
            "passes": name,
            **rates.plain_rate(target, 100, read, copy),
            **rates.host_gaps(target, device, 20),
        }
        for name, target in (
            ("launched", decoder),
            ("replayed", GraphedDecoder(decoder, Recordings(device))),
        )
    ]
    return {"weight_bytes": read, "copy_bytes_per_s": copy, "rows": rows}


def _on(
    run: Callable[[checks.Trial], Facts], model: str, device: torch.device, left_s: float
) -> Facts:
    return run(trial_of(model, device))


def _kernels(name: str, size: str, left_s: float) -> Facts:
    return rates.kernels(name, size)


def _decoding(model: str, name: str, speculation: bool, left_s: float) -> Facts:
    return rates.decoding(model, name, speculation=speculation, limit=_PROMPTS)


def stages_of(name: str, device: torch.device, models: Sequence[str]) -> list[Stage]:
    """What is to be run on the GPU called ``name``: checks first."""
    stages = [
        Stage("a verification never waits", lambda left_s: checks.never_waits(device)),
        Stage("native tests", partial(native_tests, _TESTS)),
    ]
    for model in models:
        stages += [
            Stage(f"{model}: as on the CPU", partial(_on, checks.as_on_the_cpu, model, device)),
            Stage(f"{model}: in any company", partial(_on, checks.in_any_company, model, device)),
            Stage(f"{model}: graphs", partial(_on, checks.recorded_steps, model, device)),
            Stage(f"{model}: ahead", partial(_on, checks.steps_ahead, model, device)),
            Stage(
                f"{model}: ahead, guided", partial(_on, checks.guided_steps_ahead, model, device)
            ),
            Stage(f"{model}: bits of a row", partial(_on, checks.bits_of_a_row, model, device)),
        ]
    drafted = [model for model in models if shipped_drafter(model) is not None]
    for model in drafted:
        run = partial(_on, checks.with_and_without_speculation, model, device)
        stages.append(Stage(f"{model}: speculation on and off", run))
    for size in ("qwen2.5-coder-0.5b", "qwen3-4b"):
        stages.append(Stage(f"kernels, {size}", partial(_kernels, name, size)))
    stages.append(Stage("4B, random weights", partial(four_billion, device)))
    for model in models:
        for speculation in (False, True) if model in drafted else (False,):
            said = "on" if speculation else "off"
            run = partial(_decoding, model, name, speculation)
            stages.append(Stage(f"{model}: decode, speculation {said}", run))
    return stages


def check(name: str, models: Sequence[str], out: Path, limit_s: float) -> GpuReport:
    """Run all stages and write ``gpu-check.json`` and ``gpu-check.md`` to ``out``; whatever was
    finished when something ends the process is in them.

    Raises DeviceError where there is no such GPU, BenchError where it is the CPU.
    """
    device = gpu(name)
    if device is None:
        raise BenchError("a GPU is checked, not the CPU: name one, such as cuda")
    out.mkdir(parents=True, exist_ok=True)
    host, done = host_facts(name), list[StageReport]()

    def note(stage: StageReport) -> None:
        done.append(stage)
        write(GpuReport(host=host, stages=tuple(done)), out)
        print(f"{stage.name}: {stage.ending.value} after {stage.seconds:.1f} s {stage.said[:200]}")

    return GpuReport(
        host=host, stages=run_stages(stages_of(name, device, models), limit_s, on_stage=note)
    )


def write(report: GpuReport, out: Path) -> None:
    """Both files of ``report``."""
    (out / "gpu-check.json").write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
    (out / "gpu-check.md").write_text(markdown(report), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where every stage passed, 1 where one did not, 2 where there is no GPU to check."""
    parser = argparse.ArgumentParser(prog="python -m dspark_backend.bench.gpu_check")
    parser.add_argument("--device", default="cuda", help="cuda or cuda:N")
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="folder of the tables")
    parser.add_argument("--model", action="append", help="may be repeated; the two small ones")
    parser.add_argument("--seconds", type=float, default=LIMIT_S, help="for all of it")
    given = parser.parse_args(arguments)
    try:
        report = check(given.device, given.model or MODELS, given.out, given.seconds)
    except BackendError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
