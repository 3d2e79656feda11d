"""Training and evaluation on a terminal: a bar that says how it goes, and tables of figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

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


def figures_table(title: str, evaluation: Evaluation) -> Table:
    """Accepted length, acceptance by slot, ranking and calibration: overall, by source, by kind."""
    table = Table(title=title, box=None, header_style="bold", pad_edge=False, title_justify="left")
    columns = (
        "",
        "tokens",
        "accepted length",
        "accepted by slot",
        "AUC",
        "ECE before",
        "ECE after",
    )
    for column in columns:
        table.add_column(column, justify="left" if not column else "right")
    _row(table, "all", evaluation.overall)
    for name, figures in evaluation.by_source.items():
        _row(table, name, figures)
    for name, figures in evaluation.by_kind.items():
        _row(table, name, figures)
    return table


def _row(table: Table, name: str, figures: Figures) -> None:
    share: Callable[[float], str] = "{:.2f}".format
    percent: Callable[[float], str] = "{:.1%}".format
    table.add_row(
        name,
        str(figures.tokens),
        f"{figures.accepted_length:.2f}",
        " ".join(map(share, figures.acceptance)),
        " ".join(map(share, figures.auc)),
        " ".join(map(percent, figures.ece_before)),
        " ".join(map(percent, figures.ece_after)),
    )
