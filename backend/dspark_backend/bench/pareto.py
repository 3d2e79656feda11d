"""``bench pareto``: what many agents get together against what each of them gets.

Every contender is our own engine under another policy; all replay the same recorded runs, wave by
wave in turns, with 1 to 32 agents at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from dspark_backend.bench.contender import ContenderSpec
from dspark_backend.bench.crowd import CrowdWorker, Wave
from dspark_backend.bench.errors import BenchError
from dspark_backend.bench.host import host_facts
from dspark_backend.bench.lineup import Subject, Terms, contender_spec, in_turn, warm_up
from dspark_backend.bench.pareto_report import ParetoContender, ParetoPoint, ParetoReport, leads
from dspark_backend.bench.steps import room
from dspark_backend.bench.trace import TraceRun, read_trace
from dspark_backend.catalog import ProgressSink
from dspark_backend.engine import DEFAULT_KV_BYTES
from dspark_backend.kv.contiguous import KVShape
from dspark_backend.scheduler import Limits
from dspark_backend.speculation.policies import named
from dspark_backend.speculation.signals import Signals

PLAIN: Final = "plain"
OURS: Final = "step_aware"
MTP: Final = "mtp"
CONTENDERS: Final = (PLAIN, "fixed-2", "fixed", "prefix_throughput", OURS)
CONCURRENCY: Final = (1, 2, 4, 8, 16, 32)
# A drafter's context takes a few layers beside the target's own.
_KV_MARGIN = 1.25


@dataclass(frozen=True, slots=True)
class ParetoSettings:
    """What to run. ``traces`` are JSON-lines files, see :mod:`dspark_backend.bench.trace`, of which
    the first ``limit`` lines count; ``contenders`` are names of budget policies beside ``plain``,
    which always takes part; ``mtp`` is the folder of a drafter whose whole blocks one more
    contender verifies. All but ``step_aware`` verify the drafter's blocks alone, without copies, as
    engines without agents do. Of ``terms``, precision, threads and drafter count."""

    model: str
    traces: tuple[Path, ...]
    contenders: tuple[str, ...] = CONTENDERS
    concurrency: tuple[int, ...] = CONCURRENCY
    rounds: int = 3
    limit: int | None = None
    mtp: Path | None = None
    terms: Terms = field(default_factory=lambda: Terms(speculation=True))

    def __post_init__(self) -> None:
        most = Limits().running
        if not self.concurrency or not all(1 <= agents <= most for agents in self.concurrency):
            raise BenchError(
                f"concurrency must be numbers of agents from 1 to {most}, not "
                f"{', '.join(map(str, self.concurrency)) or 'none'}"
            )
        if self.rounds < 1:
            raise BenchError(f"rounds must be at least 1, not {self.rounds}")
        if not self.traces:
            raise BenchError("name at least one trace to replay")
        for name in self.contenders:
            named(name, 1)

    @property
    def names(self) -> tuple[str, ...]:
        """All contenders, plain decoding first, each once."""
        extra = () if self.mtp is None else (MTP,)
        return tuple(dict.fromkeys((PLAIN, *self.contenders, *extra)))


OnWave = Callable[[int, int], None]
"""Called as ``(waves done, waves to do)``."""


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
            leads=leads(OURS, contenders),
        )


def crowd_spec(
    subject: Subject, terms: Terms, traces: Sequence[TraceRun], agents: int
) -> ContenderSpec:
    """What a contender loads so that ``agents`` replay ``traces`` at once and none has to queue.

    Raises BenchError when a run has no room in the model.
    """
    spec = contender_spec(subject, terms, max(room(subject, trace) for trace in traces))
    config = subject.files.config
    position = KVShape(config.num_layers, config.num_kv_heads, config.head_dim).bytes_per_token
    granted = round(_KV_MARGIN * agents * spec.max_context * position)
    return replace(spec, kv_bytes=max(DEFAULT_KV_BYTES, granted))


def contestant(name: str, base: ContenderSpec, mtp: Path | None) -> ContenderSpec:
    """The terms of the contender of that name; see :class:`ParetoSettings`."""
    if name == PLAIN:
        return replace(base, speculation=False, drafter=None, policy=None)
    drafting = replace(base, speculation=True, policy=name)
    if name == MTP:
        drafting = replace(drafting, policy="fixed", drafter=mtp)
    if name.startswith(OURS):
        return drafting
    return replace(drafting, signals=Signals.drafts_alone())


def load_of(traces: Sequence[TraceRun], agents: int) -> list[TraceRun]:
    """All of ``traces`` as often as it takes for every agent to have one, so that each of them
    counts alike at every number of agents."""
    return [*traces] * -(-agents // len(traces))


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
