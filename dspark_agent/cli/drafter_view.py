"""Training and evaluation on a terminal: a bar that says how it goes, and tables of figures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from dspark_agent.cli.console import err

if TYPE_CHECKING:
    from dspark_backend.training.evaluate import Evaluation, Figures
    from dspark_backend.training.rollout import RolloutReport
    from dspark_backend.training.trainer import TrainProgress


class RunBars:
    """What a run reports, drawn: stages as lines, rollouts as a count, training as a bar."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._rollouts = bars.add_task("answers", total=None, visible=False, note="")
        self._training = bars.add_task("train", total=None, visible=False, note="")

    def stage(self, name: str) -> None:
        self._bars.console.print(f"[note]{name}[/]")
        self._bars.update(self._rollouts, visible=False)
        self._bars.update(self._training, visible=False)

    def rollout(self, report: RolloutReport) -> None:
        left_out = f", {len(report.left_out)} prompts left out" if report.left_out else ""
        note = f"{report.answer_tokens} tokens{left_out}"
        done = report.present + report.written
        self._bars.update(self._rollouts, completed=done, visible=True, note=note)

    def step(self, progress: TrainProgress) -> None:
        agreement = " ".join(f"{share:.2f}" for share in progress.figures.agreement)
        note = (
            f"loss {progress.figures.loss:.3f}  right {agreement}  {progress.tok_per_s:.0f} tok/s"
        )
        self._bars.update(
            self._training,
            completed=progress.step,
            total=progress.steps,
            visible=True,
            note=note,
        )


@contextmanager
def run_bars() -> Iterator[RunBars]:
    """Bars on the error stream, gone when the block is left."""
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=err(),
        transient=True,
    )
    with bars:
        yield RunBars(bars)


def print_figures(console: Console, title: str, evaluation: Evaluation) -> None:
    """Accepted length by source and step kind, then what was accepted and foreseen by slot."""
    console.print(_lengths(title, evaluation))
    console.print(_slots(evaluation.overall))


def _lengths(title: str, evaluation: Evaluation) -> Table:
    table = _table(title, "", "rollouts", "tokens", "passes", "accepted length")
    rows = {"all": evaluation.overall, **evaluation.by_source, **evaluation.by_kind}
    for name, figures in rows.items():
        counts = (figures.rollouts, figures.tokens, figures.cycles)
        table.add_row(name, *map(str, counts), f"{figures.accepted_length:.2f}")
    return table


def _slots(figures: Figures) -> Table:
    table = _table("", "slot", "accepted", "AUC", "ECE before", "ECE after")
    for slot, row in enumerate(
        zip(figures.acceptance, figures.auc, figures.ece_before, figures.ece_after, strict=True)
    ):
        accepted, auc, before, after = row
        errors = (f"{before:.1%}", f"{after:.1%}")
        table.add_row(str(slot + 1), f"{accepted:.2f}", f"{auc:.2f}", *errors)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title or None, box=None, header_style="bold", pad_edge=False, title_justify="left"
    )
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table
