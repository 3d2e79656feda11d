"""The JSON that ``bench ablation`` writes, and how its figures come about."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict
from rich.table import Table

from dspark_backend.bench.contender import Sample
from dspark_backend.bench.host import HostFacts
from dspark_backend.bench.stats import median, ratio
from dspark_backend.bench.steps import turn_spec
from dspark_backend.bench.table import number, report_table
from dspark_backend.bench.trace import TraceRun
from dspark_backend.request import StepKind

SCHEMA_VERSION: Final = 1

Replay = tuple[TraceRun, tuple[Sample, ...]]
"""A run and the sample of each of its steps."""

Rounds = Sequence[Mapping[str, Sequence[Replay]]]


class AblationContender(BaseModel):
    """One contender over all rounds. ``step_s`` is the summed seconds of all steps of a round;
    ``worth`` is its step time over that with every signal on: above 1, what it lacks helps; for
    ``plain``, what all of it together gains. Medians over the rounds, as is ``worth_by_kind``.
    ``accepted_length`` is new tokens a pass; ``proposed`` and ``accepted`` count drafts by source.
    """

    model_config = ConfigDict(frozen=True)

    step_s: float
    new_tokens: int
    accepted_length: float | None
    worth: float | None
    worth_by_kind: dict[StepKind, float | None]
    proposed: dict[str, int]
    accepted: dict[str, int]
    step_s_by_round: tuple[float, ...]


class AblationReport(BaseModel):
    """The JSON that ``bench ablation`` writes. All contenders wrote the same tokens."""

    model_config = ConfigDict(frozen=True)

    schema_version: Literal[1] = SCHEMA_VERSION
    host: HostFacts
    model: str
    precision: str
    threads: int
    traces: tuple[str, ...]
    agents: int
    rounds: int
    contenders: dict[str, AblationContender]


def contenders_of(rounds: Rounds, plain: str, whole: str) -> dict[str, AblationContender]:
    """Every contender's figures against those of ``whole``; ``plain`` comes first, then it."""
    names = [plain, whole, *(name for name in rounds[0] if name not in (plain, whole))]
    return {
        name: _contender([each[name] for each in rounds], [each[whole] for each in rounds])
        for name in names
    }


def ablation_table(report: AblationReport) -> Table:
    """Seconds of all steps, and their ratio to those with every signal on, also by kind."""
    kinds = list(next(iter(report.contenders.values())).worth_by_kind)
    agents = f"{report.agents} agent{'s' if report.agents > 1 else ''}"
    table = report_table(
        f"{report.model}, {', '.join(report.traces)}, {agents}, {report.rounds} rounds",
        ("sum s", "tok/pass", "against all", *(kind.value for kind in kinds)),
    )
    for name, each in report.contenders.items():
        table.add_row(
            name,
            f"{each.step_s:.2f}",
            number(each.accepted_length, ".2f"),
            _times(each.worth),
            *(_times(each.worth_by_kind[kind]) for kind in kinds),
        )
    return table


def _contender(
    rounds: Sequence[Sequence[Replay]], whole: Sequence[Sequence[Replay]]
) -> AblationContender:
    samples = [sample for replays in rounds for _, sample in _steps(replays)]
    seconds = tuple(map(_seconds, rounds))
    kinds = sorted({kind for kind, _ in _steps(rounds[0])})
    proposed: Counter[str] = Counter()
    accepted: Counter[str] = Counter()
    for sample in samples:
        proposed.update(sample.metrics.proposed)
        accepted.update(sample.metrics.accepted)
    new_tokens = sum(len(sample.token_ids) for sample in samples)
    return AblationContender(
        step_s=median(seconds) or 0.0,
        new_tokens=new_tokens // len(rounds),
        accepted_length=ratio(new_tokens, sum(sample.metrics.cycles for sample in samples)),
        worth=_worth(rounds, whole, None),
        worth_by_kind={kind: _worth(rounds, whole, kind) for kind in kinds},
        proposed=dict(proposed),
        accepted=dict(accepted),
        step_s_by_round=seconds,
    )


def _worth(
    rounds: Sequence[Sequence[Replay]],
    whole: Sequence[Sequence[Replay]],
    kind: StepKind | None,
) -> float | None:
    return median(
        ratio(_seconds(one, kind), _seconds(other, kind))
        for one, other in zip(rounds, whole, strict=True)
    )


def _seconds(replays: Sequence[Replay], kind: StepKind | None = None) -> float:
    return sum(s.total_s for its, s in _steps(replays) if kind is None or its is kind)


def _steps(replays: Sequence[Replay]) -> Iterator[tuple[StepKind, Sample]]:
    for trace, run in replays:
        for step, sample in zip(trace.steps, run, strict=True):
            spec = turn_spec(trace, step)
            yield StepKind.TEXT if spec is None else spec.kind, sample


def _times(value: float | None) -> str:
    return f"{number(value, '.2f')}x"
