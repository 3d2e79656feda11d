"""``bench ablation``: recorded agent runs with every signal of the scheduler, and with each of them
off in turn: what each is worth beside the others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Final

from dspark_backend.bench.ablation_report import AblationReport, Replay, contenders_of
from dspark_backend.bench.contender import ContenderSpec
from dspark_backend.bench.crowd import CrowdWorker, Wave
from dspark_backend.bench.crowd_terms import OnWave, check_crowd, crowd_spec, load_of
from dspark_backend.bench.errors import BenchError
from dspark_backend.bench.host import host_facts
from dspark_backend.bench.lineup import Subject, Terms, in_turn, plain_spec, warm_up
from dspark_backend.bench.trace import TraceRun, read_trace
from dspark_backend.catalog import ProgressSink
from dspark_backend.speculation.signals import Signals

PLAIN: Final = "plain"
ALL: Final = "all"
SIGNALS: Final = tuple(each.name for each in fields(Signals))


@dataclass(frozen=True, slots=True)
class AblationSettings:
    """What to run. ``traces`` are JSON-lines files, see :mod:`dspark_backend.bench.trace`, of which
    the first ``limit`` lines count; ``agents`` replay them at once; ``signals`` are turned off one
    by one. Of ``terms``, precision, threads, drafter and policy count."""

    model: str
    traces: tuple[Path, ...]
    agents: int = 1
    signals: tuple[str, ...] = SIGNALS
    rounds: int = 3
    limit: int | None = None
    terms: Terms = field(default_factory=lambda: Terms(speculation=True))

    def __post_init__(self) -> None:
        check_crowd((self.agents,), self.rounds, self.traces)
        unknown = [name for name in self.signals if name not in SIGNALS]
        if unknown:
            raise BenchError(f"there is no signal {unknown[0]!r}: {', '.join(SIGNALS)}")


def run_ablation(
    settings: AblationSettings,
    *,
    progress: ProgressSink | None = None,
    on_wave: OnWave | None = None,
) -> AblationReport:
    """Replays the traces with every contender, interleaved, and reports.

    Raises:
        BenchError: a malformed trace, a contender that cannot take part, or one that wrote other
            tokens than plain decoding.
        BackendError: the model or the drafter cannot be found, fetched or read, or a schema is not
            supported.
    """
    traces = [run for path in settings.traces for run in read_trace(path, settings.limit)]
    subject = Subject.of(settings.model, progress)
    base = crowd_spec(subject, settings.terms, traces, settings.agents)
    with ExitStack() as stack:
        workers = [
            stack.enter_context(CrowdWorker(name, spec))
            for name, spec in contestants(base, settings.signals).items()
        ]
        warm_up(subject, workers)
        waves = _waves(traces, settings.agents)
        rounds = _rounds(workers, waves, settings.agents, settings.rounds, on_wave)
        return AblationReport(
            host=host_facts(),
            model=settings.model,
            precision=workers[0].loaded.precision,
            threads=base.threads,
            traces=tuple(path.stem for path in settings.traces),
            agents=settings.agents,
            rounds=settings.rounds,
            contenders=contenders_of(rounds, PLAIN, ALL),
        )


def contestants(base: ContenderSpec, signals: Sequence[str]) -> dict[str, ContenderSpec]:
    """Plain decoding, everything, and everything without each of ``signals``."""
    return {
        PLAIN: plain_spec(base),
        ALL: base,
        **{
            f"without {name}": replace(base, signals=replace(Signals(), **{name: False}))
            for name in signals
        },
    }


def _waves(traces: Sequence[TraceRun], agents: int) -> list[list[TraceRun]]:
    """One agent takes turns with the other contenders run by run, several all runs at a time."""
    return [[trace] for trace in traces] if agents == 1 else [load_of(traces, agents)]


def _rounds(
    workers: Sequence[CrowdWorker],
    waves: Sequence[Sequence[TraceRun]],
    agents: int,
    rounds: int,
    on_wave: OnWave | None,
) -> list[dict[str, list[Replay]]]:
    """By round and contender, every run and what was written in it."""
    taken: list[dict[str, list[Replay]]] = []
    done, total = 0, rounds * len(waves) * len(workers)
    for number in range(rounds):
        replays: dict[str, list[Replay]] = defaultdict(list)
        for place, traces in enumerate(waves):
            wrote: dict[str, Wave] = {}
            for worker in in_turn(workers, number + place):
                wrote[worker.name] = worker.wave(traces, agents)
                done += 1
                if on_wave is not None:
                    on_wave(done, total)
            for name, wave in wrote.items():
                check_same(name, traces, wave, wrote[PLAIN])
                replays[name] += zip(traces, wave.runs, strict=True)
        taken.append(replays)
    return taken


def check_same(name: str, traces: Sequence[TraceRun], wave: Wave, plain: Wave) -> None:
    """Raises BenchError where a step of ``wave`` holds other token ids than plain decoding's."""
    for trace, run, expected in zip(traces, wave.runs, plain.runs, strict=True):
        for number, (sample, other) in enumerate(zip(run, expected, strict=True), start=1):
            if sample.token_ids != other.token_ids:
                raise BenchError(
                    f"{name}: run {trace.name!r}, step {number} wrote other tokens than plain "
                    "decoding: its seconds say nothing; please report this"
                )
