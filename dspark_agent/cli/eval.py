"""``dspark-agent eval``: how good a drafter is, in figures and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dspark_agent.cli.console import err, out
from dspark_agent.cli.drafter_view import print_figures, run_bars


def evaluate(
    model: Annotated[str, typer.Option("--model", "-m", help="Known name, path or hub id.")],
    drafter: Annotated[Path, typer.Option(help="Folder of the drafter's checkpoint.")],
    prompts: Annotated[
        Path, typer.Option(help="JSON lines with `messages` (and `tools`, `source`).")
    ],
    json_file: Annotated[Path, typer.Option("--json", help="Report; plots are written beside it.")],
    held_out: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share that training held out; 1 for all.")
    ] = 0.05,
    first: Annotated[
        list[str] | None, typer.Option(help="A source to answer first; may be repeated.")
    ] = None,
    answer_tokens: Annotated[int, typer.Option(min=1, help="At each temperature.")] = 20_000,
    max_answer: Annotated[int, typer.Option(min=2, help="Tokens an answer has at most.")] = 256,
    precision: Annotated[str | None, typer.Option(help="The target's.")] = None,
    threads: Annotated[int | None, typer.Option(min=1)] = None,
) -> None:
    """Accepted length at temperature 0 and 1, acceptance by slot, ranking and calibration."""
    from dspark_backend.training.chart import write_acceptance, write_reliability
    from dspark_backend.training.evaluation_run import EvalConfig, run_eval
    from dspark_backend.training.rollout import RolloutConfig

    json_file.parent.mkdir(parents=True, exist_ok=True)
    config = EvalConfig(
        model=model,
        drafter=drafter,
        prompts=prompts,
        work=json_file.parent,
        held_out=held_out,
        first_sources=tuple(first or ()),
        answer_tokens=answer_tokens,
        rollout=RolloutConfig(max_answer_tokens=max_answer),
        precision=precision,
        threads=threads,
    )
    with run_bars() as bars:
        report = run_eval(config, bars.stage, bars.rollout)
    json_file.write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
    for temperature, evaluation in report.by_temperature.items():
        print_figures(out(), f"temperature {temperature}", evaluation)
        plot = json_file.with_name(f"{json_file.stem}-reliability-{temperature}.png")
        write_reliability(evaluation.reliability, plot)
    rates = {
        f"temperature {t}": evaluation.overall.acceptance
        for t, evaluation in report.by_temperature.items()
    }
    write_acceptance(rates, json_file.with_name(f"{json_file.stem}-acceptance.png"))
    if report.complaint is not None:
        err().print(f"[bad]{report.complaint}[/]")
    err().print(f"[note]{json_file}[/]")
