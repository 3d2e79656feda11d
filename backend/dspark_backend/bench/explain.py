"""A step's cycles, line by line: what was proposed, verified and accepted, and why."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.table import Table

from dspark_backend.bench.steps_report import StepsReport
from dspark_backend.speculation.account import CycleAccount
from dspark_backend.tokenizer import Tokenizer


def explain_table(report: StepsReport, tokenizer: Tokenizer) -> Table:
    """The step of ours with the most cycles. Raises ValueError where none was accounted for."""
    explained = [
        (len(step.cycles), run.name, number, step.cycles)
        for run in report.runs
        for number, step in enumerate(run.steps, start=1)
        if step.cycles
    ]
    if not explained:
        raise ValueError("no step has accounts of its cycles: run with explain on")
    _, name, number, cycles = max(explained, key=lambda item: item[0])
    table = Table(title=f"{name}, step {number}: {len(cycles)} cycles", title_justify="left")
    for column in ("log", "verified", "accepted", "written", "rows", "draft", "pass", "foreseen"):
        table.add_column(column, justify="right")
    table.add_column("proposed (accepted | refused | not verified)", overflow="fold")
    table.add_column("why")
    for cycle in cycles:
        table.add_row(
            str(cycle.position),
            str(cycle.verified),
            str(cycle.accepted),
            str(cycle.written),
            str(cycle.rows),
            _milliseconds(cycle.draft_s),
            _milliseconds(cycle.verify_s),
            "-" if cycle.predicted_s is None else _milliseconds(cycle.predicted_s),
            _proposed(cycle, tokenizer),
            f"{_sources(cycle)}{cycle.reason}",
        )
    return table


def _proposed(cycle: CycleAccount, tokenizer: Tokenizer) -> str:
    parts: Sequence[Sequence[int]] = (
        cycle.tokens[: cycle.accepted],
        cycle.tokens[cycle.accepted : cycle.verified],
        cycle.tokens[cycle.verified :],
    )
    shown = [repr(tokenizer.decode(list(part)))[1:-1] if part else "" for part in parts]
    # Square brackets are markup for the console.
    return " | ".join(shown).replace("[", r"\[") if any(shown) else ""


def _sources(cycle: CycleAccount) -> str:
    runs = [f"{source} {len(list(run))}" for source, run in groupby(cycle.sources)]
    return f"{', '.join(runs)}: " if runs else ""


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.1f}"
