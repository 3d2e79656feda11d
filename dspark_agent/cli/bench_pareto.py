"""``dspark-agent bench pareto``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dspark_agent.cli.bench_options import Drafter, Json, Limit, Model, Precision, Threads, Traces
from dspark_agent.cli.bench_report import counter, write_report
from dspark_agent.cli.console import check_writable, err, out
from dspark_agent.cli.progress import model_bars


def pareto(
    model: Model,
    json_file: Json,
    trace: Traces = None,
    limit: Limit = None,
    concurrency: Annotated[
        str, typer.Option(help="Agents at once, with commas between.")
    ] = "1,2,4,8,16,32",
    contender: Annotated[
        list[str] | None,
        typer.Option(
            help="Budget policy, such as fixed-3, or fixed-3:drafts for one without copies; may be "
            "repeated. plain always takes part. When left out: fixed-2, fixed, prefix_throughput, "
            "step_aware, and the last two on drafts alone."
        ),
    ] = None,
    mtp: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Folder of one more drafter to compare with, such as an MTP-1 "
            "(train --block-size 1).",
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Waves of each, in turns.")] = 3,
    drafter: Drafter = None,
    precision: Precision = None,
    threads: Threads = None,
    png: Annotated[
        Path | None, typer.Option(help="Where the plot goes; beside the report when left out.")
    ] = None,
) -> None:
    """Tokens a second of all agents against those of each, by policy and number of agents."""
    from dspark_backend.bench.jsonl import shipped, shipped_names
    from dspark_backend.bench.lineup import Terms
    from dspark_backend.bench.pareto import CONTENDERS, ParetoSettings, run_pareto
    from dspark_backend.bench.pareto_view import leads_table, pareto_table, plot_pareto

    settings = ParetoSettings(
        model=model,
        traces=tuple(shipped("traces", name) for name in trace or shipped_names("traces")),
        contenders=tuple(contender or CONTENDERS),
        concurrency=_counts(concurrency),
        rounds=rounds,
        limit=limit,
        mtp=mtp,
        terms=Terms(speculation=True, drafter=drafter, precision=precision, threads=threads),
    )
    plot = png or json_file.with_suffix(".png")
    check_writable(json_file)
    check_writable(plot)
    with model_bars() as downloads, counter("waves") as counted:
        report = run_pareto(settings, progress=downloads, on_wave=counted)
    out().print(pareto_table(report))
    if report.leads:
        out().print(leads_table(report))
    write_report(report, json_file)
    plot_pareto(report, plot)
    err().print(f"[note]wrote {plot}[/]")


def _counts(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r} is not a list of numbers such as 1,4,16", param_hint="--concurrency"
        ) from error
