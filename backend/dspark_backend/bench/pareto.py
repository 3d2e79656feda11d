"""``bench pareto``: what many agents get together against what each of them gets.

Every contender is our own engine under another policy; all replay the same recorded runs, wave by
wave in turns, with 1 to 32 agents at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from dspark_backend.bench.contender import ContenderSpec
from dspark_backend.bench.crowd import CrowdWorker, Wave
from dspark_backend.bench.crowd_terms import OnWave, check_crowd, crowd_spec, load_of
from dspark_backend.bench.host import host_facts
from dspark_backend.bench.lineup import Subject, Terms, drafting_spec, in_turn, plain_spec, warm_up
from dspark_backend.bench.pareto_report import (
    ALONE,
    MTP,
    PLAIN,
    ParetoContender,
    ParetoPoint,
    ParetoReport,
    leads,
)
from dspark_backend.bench.trace import TraceRun, read_trace
from dspark_backend.catalog import ProgressSink
from dspark_backend.speculation.policies import named
from dspark_backend.speculation.signals import Signals

OURS: Final = "step_aware"
CONTENDERS: Final = (
    PLAIN,
    "fixed-2",
    "fixed",
    "prefix_throughput",
    OURS,
    f"prefix_throughput{ALONE}",
    f"{OURS}{ALONE}",
)
CONCURRENCY: Final = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True, slots=True)
class ParetoSettings:
    """What to run. ``traces`` are JSON-lines files, see :mod:`dspark_backend.bench.trace`, of which
    the first ``limit`` lines count; ``contenders`` are names of budget policies beside ``plain``,
    which always takes part. All of them have the same proposers and signals, so that nothing but
    the policy tells them apart: how much is verified and, with ``step_aware``, whether the drafter
    is asked at all. A name that ends in ``:drafts`` has the drafter's blocks alone; then policies
    but ours know no agents, as in other engines: no calibration by step kind. ``mtp`` is the folder
    of a drafter whose whole blocks, alone, one more contender verifies. Of ``terms``, precision,
    threads and drafter count."""

    model: str
    traces: tuple[Path, ...]
    contenders: tuple[str, ...] = CONTENDERS
    concurrency: tuple[int, ...] = CONCURRENCY
    rounds: int = 3
    limit: int | None = None
    mtp: Path | None = None
    terms: Terms = field(default_factory=lambda: Terms(speculation=True))

    def __post_init__(self) -> None:
        check_crowd(self.concurrency, self.rounds, self.traces)
        for name in self.contenders:
            named(name.removesuffix(ALONE), 1)

    @property
    def names(self) -> tuple[str, ...]:
        """All contenders, plain decoding first, each once."""
        extra = () if self.mtp is None else (MTP,)
        return tuple(dict.fromkeys((PLAIN, *self.contenders, *extra)))


def run_pareto(
    settings: ParetoSettings,
    *,
    progress: ProgressSink | None = None,
    on_wave: OnWave | None = None,
) -> ParetoReport:
    """Replays the traces with every contender at every number of agents, interleaved, and reports.

    Raises:
        BenchError: a malformed trace, or a contender that cannot take part.
        BackendError: the model or a drafter cannot be found, fetched or read, or a schema is not
            supported.
    """
    traces = [run for path in settings.traces for run in read_trace(path, settings.limit)]
    subject = Subject.of(settings.model, progress)
    base = crowd_spec(subject, settings.terms, traces, max(settings.concurrency))
    levels = tuple(sorted(set(settings.concurrency)))
    with ExitStack() as stack:
        workers = [
            stack.enter_context(CrowdWorker(name, contestant(name, base, settings.mtp)))
            for name in settings.names
        ]
        warm_up(subject, workers)
        waves = _waves(workers, traces, levels, settings.rounds, on_wave)
        contenders = {
            worker.name: ParetoContender(
                points=tuple(
                    ParetoPoint.of(agents, waves[worker.name, agents], waves[PLAIN, agents][0])
                    for agents in levels
                ),
                peak_rss_bytes=worker.peak_rss_bytes(),
            )
            for worker in workers
        }
        return ParetoReport(
            host=host_facts(),
            model=settings.model,
            precision=workers[0].loaded.precision,
            threads=base.threads,
            traces=tuple(path.stem for path in settings.traces),
            concurrency=levels,
            rounds=settings.rounds,
            contenders=contenders,
            leads=(*leads(OURS, contenders), *leads(f"{OURS}{ALONE}", contenders)),
        )


def contestant(name: str, base: ContenderSpec, mtp: Path | None) -> ContenderSpec:
    """The terms of the contender of that name; see :class:`ParetoSettings`."""
    if name == PLAIN:
        return plain_spec(base)
    if name == MTP:
        return drafting_spec(replace(base, drafter=mtp), "fixed")
    if name == f"{OURS}{ALONE}":
        signals = Signals(copies=False, splice=False)
        return replace(base, speculation=True, policy=OURS, signals=signals)
    if name.endswith(ALONE):
        return drafting_spec(base, name.removesuffix(ALONE))
    return replace(base, speculation=True, policy=name)


def _waves(
    workers: Sequence[CrowdWorker],
    traces: Sequence[TraceRun],
    levels: Sequence[int],
    rounds: int,
    on_wave: OnWave | None,
) -> dict[tuple[str, int], list[Wave]]:
    waves: dict[tuple[str, int], list[Wave]] = {
        (worker.name, agents): [] for worker in workers for agents in levels
    }
    done, total = 0, rounds * len(waves)
    for index in range(rounds):
        for agents in levels:
            for worker in in_turn(workers, index):
                waves[worker.name, agents].append(worker.wave(load_of(traces, agents), agents))
                done += 1
                if on_wave is not None:
                    on_wave(done, total)
    return waves
