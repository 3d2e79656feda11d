"""Find and fix the bug behind a failing test, in steps a small model can take.

The recipe in ``dspark_tools.bugfix`` runs the tests, reads the module, names the function and has
it written anew until the tests pass. Here its steps are printed as they happen.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import anyio

from dspark_agent import AgentEvent, DSparkModel, Model, StepEnd, ToolResult
from dspark_tools import Pytest, Snapshot
from dspark_tools.bugfix import BugFix, fix_bug
from dspark_tools.tasks import BugFixTask, load_task, materialise


def show(event: AgentEvent) -> None:
    """Prints what a tool was called for and what it found, and what the step took."""
    match event:
        case ToolResult(part=part):
            print(f"{part.tool_name}:\n{_indented(part.model_text())}")
        case StepEnd(step=step, result=result):
            if not result.tool_calls:
                print(f"the model says:\n{_indented(result.text)}")
            metrics = result.metrics
            print(f"  [step {step}: {metrics.total_s:.2f} s, {metrics.new_tokens} tokens written]")


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


async def fix(model: Model, task: BugFixTask, folder: Path, *, rounds: int = 8) -> BugFix:
    """Put the task's project into ``folder``, fix it, and print the steps and the change."""
    workspace = materialise(task, folder)
    before = Snapshot.take(workspace)
    tests = Pytest(workspace, plugins=False)
    print(task.instruction)
    result = await fix_bug(
        model, workspace, task.instruction, rounds=rounds, tests=tests, on_event=show
    )
    print(before.diff(Snapshot.take(workspace)) or "nothing was changed")
    print(result.report.text())
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Fix the bug behind a failing test.")
    parser.add_argument("--model", default="qwen2.5-coder-0.5b")
    parser.add_argument("--threads", type=int, help="of the engine; all cores by default")
    parser.add_argument("--task", default="average", help="one of dspark_tools.tasks")
    parser.add_argument("--rounds", type=int, default=8, help="how often code is written")
    args = parser.parse_args(argv)
    model = DSparkModel(args.model, threads=args.threads)

    async def run() -> BugFix:
        async with model:
            return await fix(model, load_task(args.task), Path(folder), rounds=args.rounds)

    with TemporaryDirectory() as folder:
        result = anyio.run(run)
    raise SystemExit(0 if result.fixed else 1)


if __name__ == "__main__":
    main()
