"""``dspark-agent bench ablation``."""

from __future__ import annotations

from typing import Annotated

import typer

from dspark_agent.cli.bench_options import Drafter, Json, Limit, Model, Precision, Threads, Traces
from dspark_agent.cli.bench_report import counter, write_report
from dspark_agent.cli.console import check_writable, out
from dspark_agent.cli.progress import model_bars


def ablation(
    model: Model,
    json_file: Json,
    trace: Traces = None,
    limit: Limit = None,
    agents: Annotated[int, typer.Option(min=1, help="Agents at once.")] = 1,
    signal: Annotated[
        list[str] | None,
        typer.Option(
            help="Signal to turn off, such as copies; may be repeated. Each in turn when left out."
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Replays of each run, in turns.")] = 3,
    drafter: Drafter = None,
    precision: Precision = None,
    threads: Threads = None,
) -> None:
    """What each signal of the scheduler is worth on recorded agent runs."""
    from dspark_backend.bench.ablation import SIGNALS, AblationSettings, run_ablation
    from dspark_backend.bench.ablation_report import ablation_table
    from dspark_backend.bench.jsonl import shipped, shipped_names
    from dspark_backend.bench.lineup import Terms

    settings = AblationSettings(
        model=model,
        traces=tuple(shipped("traces", name) for name in trace or shipped_names("traces")),
        agents=agents,
        signals=tuple(signal or SIGNALS),
        rounds=rounds,
        limit=limit,
        terms=Terms(speculation=True, drafter=drafter, precision=precision, threads=threads),
    )
    check_writable(json_file)
    with model_bars() as downloads, counter("waves") as counted:
        report = run_ablation(settings, progress=downloads, on_wave=counted)
    out().print(ablation_table(report))
    write_report(report, json_file)
