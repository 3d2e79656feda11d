"""``bench steps``: recorded agent runs replayed, the seconds of every step, ours beside a peer's.

The model writes its own answer in each step; the trace's messages for the next step follow it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dspark_backend.bench.contender import Sample, Turn
from dspark_backend.bench.host import host_facts
from dspark_backend.bench.lineup import Lineup, Subject, Terms
from dspark_backend.bench.steps_report import (
    Step,
    StepsPeer,
    StepsReport,
    StepsRun,
    totals_of,
)
from dspark_backend.bench.trace import NamedTool, TraceRun, TraceStep, read_trace
from dspark_backend.bench.verdict import judge
from dspark_backend.bench.worker import Worker
from dspark_backend.catalog import ProgressSink
from dspark_backend.grammar.dialect import Dialect
from dspark_backend.grammar.spec import TurnSpec
from dspark_backend.request import StepKind

_STEP_MARGIN = 64


@dataclass(frozen=True, slots=True)
class StepsSettings:
    """What to run. ``trace`` is a JSON-lines file, see :mod:`dspark_backend.bench.trace`;
    ``explain`` asks our engine for an account of every cycle."""

    model: str
    trace: Path
    limit: int | None = None
    explain: bool = False
    terms: Terms = field(default_factory=Terms)


OnStep = Callable[[int, int], None]
"""Called as ``(steps taken, steps to take)``, those of all contenders counted."""


def run_steps(
    settings: StepsSettings,
    *,
    progress: ProgressSink | None = None,
    on_step: OnStep | None = None,
) -> StepsReport:
    """Replays every run with every contender, interleaved run by run, and reports.

    Raises:
        BenchError: a malformed trace, or a contender that cannot take part.
        BackendError: the model cannot be found, fetched or read, or a schema is not supported.
    """
    traces = read_trace(settings.trace, settings.limit)
    subject = Subject.of(settings.model, progress)
    context = max(room(subject, trace) for trace in traces)
    with Lineup(subject, settings.terms, context) as lineup:
        runs: dict[str, list[StepsRun]] = {worker.name: [] for worker in lineup.all}
        taken, total = 0, len(lineup.all) * sum(len(trace.steps) for trace in traces)
        for index, trace in enumerate(traces):
            for worker in lineup.order(index):
                steps = []
                for step in _replay(subject, worker, trace, explain=settings.explain):
                    steps.append(step)
                    taken += 1
                    if on_step is not None:
                        on_step(taken, total)
                runs[worker.name].append(StepsRun(name=trace.name, steps=tuple(steps)))
        totals = {
            worker.name: totals_of(runs[worker.name], worker.peak_rss_bytes())
            for worker in lineup.all
        }
        ours = totals[lineup.ours.name]
        return StepsReport(
            host=host_facts(),
            model=settings.model,
            precision=lineup.ours.loaded.precision,
            speculation=settings.terms.switch,
            threads=lineup.threads,
            load_s=lineup.ours.loaded.load_s,
            runs=tuple(runs[lineup.ours.name]),
            totals=ours,
            peers={
                name: StepsPeer(
                    precision=peer.loaded.precision,
                    totals=totals[name],
                    speedup=totals[name].step_s.over(ours.step_s),
                    speedup_by_kind={
                        kind: totals[name].step_s.by_kind[kind].over(spread)
                        for kind, spread in ours.step_s.by_kind.items()
                    },
                    decoding=totals[name].step_s.decoding_over(ours.step_s),
                    decoding_by_kind={
                        kind: totals[name].step_s.by_kind[kind].decoding_over(spread)
                        for kind, spread in ours.step_s.by_kind.items()
                    },
                    runs=tuple(runs[name]),
                )
                for name, peer in lineup.peers.items()
            },
        )


def turn_spec(trace: TraceRun, step: TraceStep) -> TurnSpec | None:
    """What ``step`` may emit; ``None`` where it is free text and nothing else.

    A step with an output schema writes that object or calls a tool, never text.
    """
    choice = step.tool_choice
    spec = TurnSpec(
        tools=trace.tools,
        tool_choice={"name": choice.name} if isinstance(choice, NamedTool) else choice,
        output_schema=step.output_schema,
        allow_text=step.output_schema is None,
    )
    return None if spec.kind is StepKind.TEXT else spec


def given_tokens(dialect: Dialect, trace: TraceRun, index: int, *, closed: bool) -> tuple[int, ...]:
    """What goes into the log before step ``index`` of ``trace``; ``closed`` says whether the
    answer before it ended with an end token."""
    if index == 0:
        return tuple(dialect.render_start(trace.opening(), list(trace.tools)))
    given = [dict(message) for message in trace.steps[index].messages]
    return tuple(dialect.render_next(given, closed=closed))


def _replay(subject: Subject, worker: Worker, trace: TraceRun, *, explain: bool) -> Iterator[Step]:
    worker.start()
    history = 0
    closed = True
    for index, step in enumerate(trace.steps):
        tokens = given_tokens(subject.dialect, trace, index, closed=closed)
        spec = turn_spec(trace, step)
        sample = worker.turn(Turn(tokens, step.max_new_tokens, spec, explain=explain))
        yield _step(subject, sample, spec, history)
        history += len(tokens) + len(sample.token_ids)
        closed = bool(sample.token_ids) and sample.token_ids[-1] in subject.tokenizer.eos_token_ids


def _step(subject: Subject, sample: Sample, spec: TurnSpec | None, history: int) -> Step:
    verdict = judge(sample.text, spec, subject.dialect.name)
    return Step.of(
        kind=StepKind.TEXT if spec is None else spec.kind,
        sample=sample,
        output=verdict.output,
        problem=verdict.problem,
        history_tokens=history,
    )


def room(subject: Subject, trace: TraceRun) -> int:
    """Tokens that a replay of ``trace`` can take at most: all given text, all answers, and what
    the template writes around each."""
    given = len(subject.dialect.render_start(trace.opening(), list(trace.tools)))
    later: Sequence[TraceStep] = trace.steps[1:]
    for step in later:
        for message in step.messages:
            given += len(subject.tokenizer.encode(str(message.get("content", ""))))
    written = sum(step.max_new_tokens for step in trace.steps)
    return given + written + _STEP_MARGIN * len(trace.steps)
