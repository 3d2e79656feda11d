"""Where the time of an agent's steps goes.

Three kinds of steps, a tool call, a typed result and a text, are taken in a few sessions; the
table shows each kind's median. The parts of a step add up to its total.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Annotated, Literal

import anyio
from pydantic import BaseModel, Field

from dspark_agent import Agent, DSparkModel, Model, StepMetrics

COLUMNS = {
    "new": "prefill_new_tokens",
    "cached": "prefill_cached_tokens",
    "written": "new_tokens",
    "first ms": "ttft_s",
    "prefill ms": "prefill_s",
    "decode ms": "decode_s",
    "grammar ms": "grammar_s",
    "tools ms": "tool_s",
    "rest ms": "overhead_s",
    "total ms": "total_s",
}
"""Title of a column, and the field of StepMetrics in it."""


class Verdict(BaseModel):
    """What the agent reads out of a log."""

    level: Literal["fine", "warning", "broken"]
    disk_percent: int = Field(ge=0, le=100)


def read_log(server: Annotated[int, Field(ge=1, le=9)]) -> str:
    """Read the log of a server.

    Args:
        server: Number of the server.
    """
    return f"server {server}: 12 requests served.\nserver {server}: disk is 9{server} % full.\n"


async def measure(model: Model, rounds: int = 3) -> Mapping[str, list[StepMetrics]]:
    """Take each kind of step once a round; the metrics of each."""
    found: dict[str, list[StepMetrics]] = defaultdict(list)
    agent = Agent(model, tools=[read_log], instructions="You watch over servers.")
    for number in range(1, rounds + 1):
        async with agent.session() as session:
            await session.step(f"Read the log of server {number}.", tool_choice="read_log")
            await session.step("How is the server?", output_type=Verdict)
            await session.step("Tell the owner in one sentence.", output_type=str)
            for step in session.steps:
                found[step.kind].append(step.metrics)
    return found


def table(found: Mapping[str, Sequence[StepMetrics]]) -> str:
    """A line for each kind of step: the medians, times in milliseconds."""
    lines = [" " * 14 + "".join(f"{title:>12}" for title in COLUMNS)]
    for kind, metrics in found.items():
        cells = []
        for name in COLUMNS.values():
            value = median(getattr(each, name) for each in metrics)
            cells.append(f"{1000 * value:>12.1f}" if name.endswith("_s") else f"{value:>12.0f}")
        lines.append(f"{kind:<14}" + "".join(cells))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Where the time of an agent's steps goes.")
    parser.add_argument("--model", default="qwen2.5-coder-0.5b")
    parser.add_argument("--threads", type=int, help="of the engine; all cores by default")
    parser.add_argument("--max-tokens", type=int, default=60, help="of one step")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    model = DSparkModel(args.model, threads=args.threads, settings={"max_tokens": args.max_tokens})

    async def run() -> Mapping[str, list[StepMetrics]]:
        async with model:
            await model.load()
            return await measure(model, args.rounds)

    print(table(anyio.run(run)))


if __name__ == "__main__":
    main()
