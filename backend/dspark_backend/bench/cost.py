"""``bench cost``: what passes and drafts take on this machine, and how well that foretells others.

Measured longer than at load, and kept in the cache in place of what was measured then.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict

from dspark_backend.bench.errors import BenchError
from dspark_backend.bench.host import HostFacts, host_facts
from dspark_backend.catalog import ModelFiles, ProgressSink, resolve
from dspark_backend.catalog.files import folder_identity
from dspark_backend.cost_measure import measure, timed
from dspark_backend.drafter.drafter import DSparkDrafter
from dspark_backend.drafter.shipped import shipped_drafter
from dspark_backend.plot import Plot, rounded_up
from dspark_backend.processor import usable_cores
from dspark_backend.rehearsal import Task, compile_kernels, sequences, verifying
from dspark_backend.sampling.verifier import HostVerifier
from dspark_backend.speculation.cost import CostModel
from dspark_backend.speculation.cost_store import conditions_here, keep
from dspark_backend.speculation.cost_table import CostTable
from dspark_backend.target.decoder import Decoder
from dspark_backend.target.load import load_decoder
from dspark_backend.target.precision import Precision, default_precision

SCHEMA_VERSION: Final = 1
_MAX_CONTEXT = 4096
# (sequences, rows of each, positions before them): none of them is a point of the table.
_CHECKS = (
    (1, 5, 256),
    (1, 7, 1000),
    (1, 20, 512),
    (2, 5, 400),
    (4, 1, 300),
    (4, 6, 700),
    (8, 5, 128),
    (16, 1, 256),
    (16, 2, 64),
)


class CostCheck(BaseModel):
    """A pass that the table does not hold: ``context`` is the sum over its sequences."""

    model_config = ConfigDict(frozen=True)

    rows: int
    requests: int
    context: int
    predicted_s: float
    measured_s: float


class CostReport(BaseModel):
    """The JSON that ``bench cost`` writes. ``drafter`` says whether there was one; ``median_error``
    is the median of |predicted / measured - 1| over ``checks``."""

    model_config = ConfigDict(frozen=True)

    schema_version: Literal[1] = SCHEMA_VERSION
    host: HostFacts
    model: str
    precision: str
    threads: int
    drafter: bool
    measure_s: float
    table: CostTable
    checks: tuple[CostCheck, ...]
    median_error: float


@dataclass(frozen=True, slots=True)
class CostSettings:
    """What to measure. ``precision`` None takes the model's default, ``threads`` None the usable
    cores, ``drafter`` None the one that ships, if one does; ``seconds`` bounds the repetitions of
    the table."""

    model: str
    precision: str | None = None
    threads: int | None = None
    drafter: Path | None = None
    seconds: float = 10.0

    def __post_init__(self) -> None:
        if not self.seconds > 0.0:
            raise BenchError(f"seconds must be positive, not {self.seconds}")


def run_cost(settings: CostSettings, *, progress: ProgressSink | None = None) -> CostReport:
    """Measures, keeps the table, and holds it against passes that it does not hold.

    Raises BackendError: the model or the drafter cannot be found, fetched or read.
    """
    files = resolve(settings.model, progress=progress)
    precision = (
        default_precision(files.name)
        if settings.precision is None
        else Precision.parse(settings.precision)
    )
    threads = settings.threads or usable_cores()
    context = min(files.config.max_position_embeddings, _MAX_CONTEXT)
    decoder = load_decoder(files, precision, context, progress)
    drafter, identity = _drafter(settings, files, context)
    compile_kernels(decoder, drafter, HostVerifier(), threads)
    conditions = conditions_here(files.source_sha, precision.value, threads, identity)
    began = time.perf_counter()
    table = measure(decoder, drafter, threads, conditions=conditions, budget_s=settings.seconds)
    measure_s = time.perf_counter() - began
    keep(table)
    taps = () if drafter is None else drafter.taps
    checks = _checks(decoder, taps, CostModel(table), threads, settings.seconds / 2)
    return CostReport(
        host=host_facts(),
        model=settings.model,
        precision=precision.value,
        threads=threads,
        drafter=drafter is not None,
        measure_s=measure_s,
        table=table,
        checks=checks,
        median_error=median(abs(c.predicted_s / c.measured_s - 1.0) for c in checks),
    )


def plot_cost(report: CostReport, path: Path) -> None:
    """Milliseconds over rows (of a pass, and with a long context) and over anchors (of a draft)."""
    table, model = report.table, CostModel(report.table)
    longer = 4 * table.context
    series = {
        f"context {table.context}": [
            (n, s) for n, s in zip(table.rows, table.verify_s, strict=True)
        ],
        f"context {longer}": [(n, model.verify_s(n, 1, longer)) for n in table.rows],
    }
    if table.anchors:
        series["draft"] = list(zip(table.anchors, table.draft_s, strict=True))
    highest = max(seconds for points in series.values() for _, seconds in points) * 1e3
    ticks = [n for n in table.rows if n == 1 or n % 8 == 0]
    plot = Plot("rows", "ms", table.rows[-1] * 1.03, ticks, rounded_up(highest))
    for number, (name, points) in enumerate(series.items()):
        plot.series([(n, 1e3 * seconds) for n, seconds in points], number, name)
    plot.write(path)


def _drafter(
    settings: CostSettings, files: ModelFiles, context: int
) -> tuple[DSparkDrafter | None, str | None]:
    folder = settings.drafter or shipped_drafter(files.name)
    if folder is None:
        return None, None
    return DSparkDrafter.load(folder, files, context), folder_identity(folder)


def _checks(
    decoder: Decoder, taps: tuple[int, ...], model: CostModel, threads: int, budget_s: float
) -> tuple[CostCheck, ...]:
    tasks: dict[str, Task] = {}
    shapes: dict[str, tuple[int, int, int]] = {}
    for requests, each, wanted in _CHECKS:
        length = min(wanted, decoder.max_positions - each)
        rows = sequences(decoder, [length + each] * requests)
        name = f"{requests} x {each} after {length}"
        tasks[name] = verifying(decoder, taps, rows, each, length)
        shapes[name] = (requests * each, requests, requests * length)
    seconds = timed(tasks, threads, budget_s)
    return tuple(
        CostCheck(
            rows=shape[0],
            requests=shape[1],
            context=shape[2],
            predicted_s=model.verify_s(*shape),
            measured_s=seconds[name],
        )
        for name, shape in shapes.items()
    )
