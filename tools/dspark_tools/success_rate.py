"""How many of the bug-fix tasks a model fixes, and in how many rounds.

``python -m dspark_tools.success_rate --model NAME [--model NAME ...]`` prints a Markdown table.
The first two rounds are greedy and the others seeded, so a model on the same engine and machine
gives the same table again. All tasks run at once: their steps share the engine's batches, and a
row of a batch does not depend on its company.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import anyio

from dspark_agent import Model, infer_model
from dspark_tools.bugfix import fix_bug
from dspark_tools.tasks import BugFixTask, load_tasks, materialise
from dspark_tools.tests import Pytest


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one task went.

    Attributes:
        task: The task's name.
        rounds: In which round the code was right that made all tests pass; None if in none.
    """

    task: str
    rounds: int | None


async def success_rate(
    model: Model, tasks: Sequence[BugFixTask], *, rounds: int = 8
) -> list[Outcome]:
    """Has the model fix each task in a fresh folder; the outcomes in the order of the tasks."""
    outcomes: dict[str, Outcome] = {}

    async def one(task: BugFixTask, folder: Path) -> None:
        workspace = materialise(task, folder)
        tests = Pytest(workspace, plugins=False)
        fix = await fix_bug(model, workspace, task.instruction, rounds=rounds, tests=tests)
        outcomes[task.name] = Outcome(task.name, fix.rounds if fix.fixed else None)

    with TemporaryDirectory(prefix="dspark-tasks-") as folder:
        async with anyio.create_task_group() as group:
            for task in tasks:
                group.start_soon(one, task, Path(folder, task.name))
    return [outcomes[task.name] for task in tasks]


def table(tasks: Sequence[BugFixTask], outcomes: Mapping[str, Sequence[Outcome]]) -> str:
    """A row for each task with the round that fixed it (``-`` for none), then the sums."""
    lines = [
        "| task | bug | " + " | ".join(outcomes) + " |",
        "|---|---|" + "---|" * len(outcomes),
    ]
    for index, task in enumerate(tasks):
        cells = [str(column[index].rounds or "-") for column in outcomes.values()]
        lines.append(f"| {task.name} | {task.bug} | " + " | ".join(cells) + " |")
    for title, limit in (("in the first round", 1), ("in two rounds", 2), ("in the end", None)):
        counts = [
            sum(o.rounds is not None and (limit is None or o.rounds <= limit) for o in column)
            for column in outcomes.values()
        ]
        cells = [f"{count} of {len(tasks)}" for count in counts]
        lines.append(f"| fixed {title} | | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="How many bug-fix tasks a model fixes.")
    parser.add_argument("--model", action="append", required=True, help="may be given again")
    parser.add_argument("--rounds", type=int, default=8, help="how often code is written at most")
    args = parser.parse_args(argv)
    tasks = load_tasks()
    outcomes: dict[str, Sequence[Outcome]] = {}

    async def run(model: Model) -> list[Outcome]:
        async with model:
            return await success_rate(model, tasks, rounds=args.rounds)

    for name in args.model:
        outcomes[name] = anyio.run(run, infer_model(name))
    print(table(tasks, outcomes))


if __name__ == "__main__":
    main()
