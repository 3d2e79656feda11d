"""Write a function so that its tests pass.

What is known of the code is decided by the grammar: it starts with the signature, and has a few
indented lines. What is not is judged by the tests, and a failure goes back to the model.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import anyio

from dspark_agent import (
    Agent,
    DSparkModel,
    JsonSchema,
    Model,
    ModelRetry,
    ModelSettings,
    RunContext,
    StepResult,
    Tool,
)
from dspark_tools import ProcessLimits, Pytest, Workspace

SIGNATURE = "def is_leap_year(year: int) -> bool:"
TESTS = """\
from years import is_leap_year


def test_every_fourth_year_is_a_leap_year():
    assert is_leap_year(2024)
    assert not is_leap_year(2023)


def test_of_the_centuries_only_every_fourth_is():
    assert is_leap_year(2000)
    assert not is_leap_year(1900)
"""


def function_schema(signature: str, max_lines: int) -> JsonSchema:
    """Code that is this function and nothing else: an indented body below the signature."""
    line = r"\n {4}( {4}){0,3}[^ \n][^\n]{0,70}"
    pattern = f"^{re.escape(signature)}({line}){{1,{max_lines}}}\n?$"
    return JsonSchema({"type": "string", "pattern": pattern})


async def write_function(
    model: Model, folder: Path, *, tries: int = 5, max_lines: int = 8
) -> tuple[StepResult[Any], ...]:
    """Ask for the function until its tests pass, ``tries`` times at most; the step of each try."""
    workspace = Workspace(folder)
    workspace.write_text("test_years.py", TESTS)
    tests = Pytest(workspace, limits=ProcessLimits(timeout_s=10.0), plugins=False)

    async def write_code(ctx: RunContext, code: str) -> str:
        """Write the function and run its tests.

        Args:
            code: The complete function.
        """
        workspace.write_text("years.py", code)
        report = await tests.report()
        if not report.ok and ctx.retry < ctx.max_retries:
            raise ModelRetry(f"{report.text(max_failures=1)}\nWrite the function differently.")
        return report.text()

    # A small model that is shown its mistake likes to repeat it: retries are less predictable.
    settings = ModelSettings(retry_temperature=0.7)
    tool = Tool(write_code, retries=tries - 1)
    async with Agent(model, tools=[tool], model_settings=settings).session() as session:
        await session.step(
            f"Write a Python function that passes these tests:\n\n{TESTS}",
            tool_choice="write_code",
            args={"code": function_schema(SIGNATURE, max_lines)},
        )
        return session.steps


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write a function so that its tests pass.")
    parser.add_argument("--model", default="qwen2.5-coder-0.5b")
    parser.add_argument("--threads", type=int, help="of the engine; all cores by default")
    parser.add_argument("--max-tokens", type=int, default=400, help="of one step")
    parser.add_argument("--tries", type=int, default=5)
    args = parser.parse_args(argv)
    model = DSparkModel(args.model, threads=args.threads, settings={"max_tokens": args.max_tokens})

    async def run() -> tuple[StepResult[Any], ...]:
        async with model:
            return await write_function(model, Path(folder), tries=args.tries)

    with TemporaryDirectory() as folder:
        steps = anyio.run(run)
    for number, step in enumerate(steps, start=1):
        written = step.tool_calls[0].args
        code = (
            written["code"] if isinstance(written, dict) else written
        )  # text where it was cut off
        print(f"-- try {number}, {step.metrics.total_s:.2f} s\n{code}")
        print(step.retry_reason or step.tool_result, end="\n\n")


if __name__ == "__main__":
    main()
