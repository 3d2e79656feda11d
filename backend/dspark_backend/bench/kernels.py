"""``bench kernels``: what each kernel takes on a GPU, beside torch and beside copying its bytes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Final, Literal

import torch
from pydantic import BaseModel, ConfigDict

from dspark_backend.bench.errors import BenchError
from dspark_backend.bench.host import HostFacts, host_facts
from dspark_backend.bench.kernel_cases import KernelCase, Size, cases
from dspark_backend.devices import gpu

SCHEMA_VERSION: Final = 1
SIZES = {
    "qwen2.5-coder-0.5b": Size(
        hidden=896, intermediate=4864, heads=14, kv_heads=2, head_dim=64, vocab=151_936,
        requests=32, rows=8, context=1024, slots=7, drafts=32_768, rank=256,
    ),
    "qwen3-4b": Size(
        hidden=2560, intermediate=9728, heads=32, kv_heads=8, head_dim=128, vocab=151_936,
        requests=32, rows=8, context=1024, slots=7, drafts=151_936, rank=256,
    ),
}  # fmt: skip
"""Shapes of known models, with a batch of 32 blocks of 7 drafts."""


class KernelRow(BaseModel):
    """One kernel: median seconds, ours and torch's; ``moved_bytes`` over ours, as a share of the
    bandwidth of a copy, is ``share``. ``apart`` is the largest difference of the two results, null
    where they are not comparable."""

    model_config = ConfigDict(frozen=True)

    op: str
    shape: str
    moved_bytes: int
    ours_s: float
    torch_s: float
    share: float
    apart: float | None


class KernelsReport(BaseModel):
    """The JSON that ``bench kernels`` writes. ``copy_bytes_per_s`` counts a copy's bytes twice, as
    they are read and written."""

    model_config = ConfigDict(frozen=True)

    schema_version: Literal[1] = SCHEMA_VERSION
    host: HostFacts
    size: str
    dtype: str
    copy_bytes_per_s: float
    rows: tuple[KernelRow, ...]


@dataclass(frozen=True, slots=True)
class KernelsSettings:
    """What to time: shapes by the name of a model, on a GPU, ``repeats`` times each."""

    size: str = "qwen2.5-coder-0.5b"
    device: str = "cuda"
    repeats: int = 50

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise BenchError(f"unknown size {self.size!r}: choose from {', '.join(SIZES)}")
        if self.repeats < 1:
            raise BenchError(f"repeats must be at least 1, not {self.repeats}")


def run_kernels(
    settings: KernelsSettings, *, on_case: Callable[[int, int], None] | None = None
) -> KernelsReport:
    """Checks every kernel against torch, then times both.

    Raises:
        DeviceError: there is no such GPU.
        BenchError: the CPU was named, or a kernel's result is not torch's.
    """
    device = gpu(settings.device)
    if device is None:
        raise BenchError("kernels are timed on a GPU: name one, such as cuda")
    stopwatch = Stopwatch(device, settings.repeats)
    bandwidth, rows = measure(SIZES[settings.size], torch.bfloat16, stopwatch, 2**30, on_case)
    return KernelsReport(
        host=host_facts(settings.device),
        size=settings.size,
        dtype="bfloat16",
        copy_bytes_per_s=bandwidth,
        rows=rows,
    )


def measure(
    size: Size,
    dtype: torch.dtype,
    stopwatch: Stopwatch,
    copy_bytes: int,
    on_case: Callable[[int, int], None] | None = None,
) -> tuple[float, tuple[KernelRow, ...]]:
    """Bytes a second of a copy of ``copy_bytes``, and every kernel's row. Raises BenchError for a
    kernel whose result is not torch's."""
    bandwidth = copy_bandwidth(copy_bytes, stopwatch)
    rows: list[KernelRow] = []
    for case in cases(size, dtype, stopwatch.device):
        apart = _apart(case)
        ours_s = stopwatch.seconds(case.ours)
        rows.append(
            KernelRow(
                op=case.op,
                shape=case.shape,
                moved_bytes=case.moved_bytes,
                ours_s=ours_s,
                torch_s=stopwatch.seconds(case.torch),
                share=case.moved_bytes / ours_s / bandwidth,
                apart=apart,
            )
        )
        if on_case is not None:
            on_case(len(rows), _CASES)
    return bandwidth, tuple(rows)


_CASES = 9


def copy_bandwidth(count_bytes: int, stopwatch: Stopwatch) -> float:
    """Bytes a second of a copy of ``count_bytes``, each read and written."""
    source = torch.zeros(count_bytes, dtype=torch.uint8, device=stopwatch.device)
    target = torch.empty_like(source)
    return 2 * count_bytes / stopwatch.seconds(lambda: target.copy_(source))


def _apart(case: KernelCase) -> float | None:
    """How far the two results lie apart. Raises BenchError where that is too far."""
    if case.tolerance is None:
        return None
    apart = float((case.ours().double() - case.torch().double()).abs().max())
    if not apart <= case.tolerance:
        raise BenchError(
            f"{case.op} {case.shape} differs from torch by {apart:.3g}, more than "
            f"{case.tolerance:.3g}: its time would mean nothing"
        )
    return apart


class Stopwatch:
    """Times what runs on ``device``: on a GPU by its own clock, and with its cache emptied before,
    since nothing of a step's last layer is left there when the next one comes."""

    FLUSH_BYTES = 256 * 2**20

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device = device
        self.repeats = repeats
        on_gpu = device.type == "cuda"
        size = self.FLUSH_BYTES if on_gpu else 0
        self._flush = torch.empty(size, dtype=torch.uint8, device=device)
        self._timed = self._on_gpu if on_gpu else self._on_cpu

    def seconds(self, run: Callable[[], object]) -> float:
        """The median of ``repeats`` runs, after two that compile and warm up."""
        for _ in range(2):
            run()
        return median(self._timed(run) for _ in range(self.repeats))

    def _on_gpu(self, run: Callable[[], object]) -> float:
        self._flush.zero_()
        start, end = (torch.Event(device=self.device, enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def _on_cpu(self, run: Callable[[], object]) -> float:
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
