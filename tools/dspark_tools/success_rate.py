"""How many of the bug-fix tasks a model fixes, in how many rounds, and how fast.

``python -m dspark_tools.success_rate --model NAME [--model NAME ...]`` prints a Markdown table;
``--out FOLDER`` keeps a report of each model, and ``--baseline FILE`` compares with an earlier
one. The first two rounds are greedy and the others seeded, so a model on the same engine and
machine gives the same table again. By default all tasks run at once: their steps share the
engine's batches, and a row of a batch does not depend on its company.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import anyio

from dspark_agent import DSparkError, Model, infer_model
from dspark_agent.evals import Attempt, Case, Dataset, EvaluationReport
from dspark_tools.bugfix import GREEDY_ROUNDS, fix_bug
from dspark_tools.tasks import BugFixTask, load_tasks, materialise
from dspark_tools.tests import Pytest


@dataclass(frozen=True, slots=True)
class Outcome:
    """In which round the code was right that made all tests pass; None if in none."""

    rounds: int | None


def fixed(attempt: Attempt[BugFixTask, Outcome]) -> dict[str, float]:
    """Whether the bug is gone: in the end, in the greedy rounds, in the first."""
    rounds = attempt.output.rounds
    return {
        "fixed": rounds is not None,
        "fixed_greedily": rounds is not None and rounds <= GREEDY_ROUNDS,
        "fixed_at_once": rounds == 1,
    }


def bug_fixes(tasks: Sequence[BugFixTask]) -> Dataset[BugFixTask, Outcome]:
    """The tasks as a data set."""
    cases = [Case(task.name, task, metadata={"bug": task.bug}) for task in tasks]
    return Dataset(cases, scorers=[fixed], name="bug fixes")


async def success_rate(
    model: Model,
    tasks: Sequence[BugFixTask],
    *,
    rounds: int = 8,
    max_concurrency: int | None = None,
) -> EvaluationReport:
    """Has the model fix each task in a fresh folder; all at once unless told otherwise."""

    async def fix(task: BugFixTask) -> Outcome:
        with TemporaryDirectory(prefix="dspark-task-") as folder:
            workspace = materialise(task, folder)
            tests = Pytest(workspace, plugins=False)
            fix = await fix_bug(model, workspace, task.instruction, rounds=rounds, tests=tests)
        return Outcome(fix.rounds if fix.fixed else None)

    return await bug_fixes(tasks).evaluate(
        fix, name=model.name, max_concurrency=max_concurrency or len(tasks)
    )


def table(tasks: Sequence[BugFixTask], reports: Mapping[str, EvaluationReport]) -> str:
    """A row for each task with the round that fixed it (``-`` for none), then the sums."""
    lines = [
        "| task | bug | " + " | ".join(reports) + " |",
        "|---|---|" + "---|" * len(reports),
    ]
    for index, task in enumerate(tasks):
        cells = [_round(report, index) for report in reports.values()]
        lines.append(f"| {task.name} | {task.bug} | " + " | ".join(cells) + " |")
    for title, score in (
        ("in the first round", "fixed_at_once"),
        ("in two rounds", "fixed_greedily"),
        ("in the end", "fixed"),
    ):
        cells = [
            f"{sum(case.scores.get(score, 0.0) for case in report.cases):.0f} of {len(tasks)}"
            for report in reports.values()
        ]
        lines.append(f"| fixed {title} | | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _round(report: EvaluationReport, index: int) -> str:
    case = report.cases[index]
    return "failed" if case.error is not None else str(case.output["rounds"] or "-")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="How many bug-fix tasks a model fixes.")
    parser.add_argument("--model", action="append", required=True, help="may be given again")
    parser.add_argument("--rounds", type=int, default=8, help="how often code is written at most")
    parser.add_argument("--concurrency", type=int, help="tasks at a time; all when left out")
    parser.add_argument("--out", type=Path, help="folder for a report of each model")
    parser.add_argument("--baseline", type=Path, help="an earlier report to compare with")
    args = parser.parse_args(argv)
    tasks = load_tasks()
    try:
        baseline = None if args.baseline is None else EvaluationReport.read(args.baseline)
    except (DSparkError, OSError) as error:
        parser.error(str(error))
    reports: dict[str, EvaluationReport] = {}

    async def run(model: Model) -> EvaluationReport:
        async with model:
            return await success_rate(
                model, tasks, rounds=args.rounds, max_concurrency=args.concurrency
            )

    for name in args.model:
        reports[name] = anyio.run(run, infer_model(name))
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            reports[name].write(args.out / f"{name.replace('/', '-')}.json")
    print(table(tasks, reports))
    if baseline is not None:
        for report in reports.values():
            print(f"\n{report.compare(baseline).table()}")


if __name__ == "__main__":
    main()
