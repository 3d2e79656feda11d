"""Two agents at work at the same time on one engine.

They share the model object, so its weights are in memory once, and the steps of both are computed
in one batch: reading the weights, which is what a step waits for, serves both.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import anyio

from dspark_agent import Agent, AgentEvent, DSparkModel, Model, RunResult, TextDelta

CODE = """\
def average(values):
    return sum(values) / len(values)
"""
PROMPT = f"Look at this Python function:\n\n{CODE}"
INSTRUCTIONS = {
    "reviewer": "You are a code reviewer. Name one input that makes the function fail.",
    "writer": "You are a technical writer. Say in two sentences what the function is for.",
}


@dataclass(slots=True)
class Worker:
    """An agent, what it came to, and when its text arrived (``time.perf_counter`` seconds)."""

    agent: Agent[None, str]
    moments: list[float] = field(default_factory=list)
    result: RunResult[str] | None = None

    async def work(self) -> None:
        self.result = await self.agent.run(PROMPT, on_event=self._note)

    def _note(self, event: AgentEvent) -> None:
        if isinstance(event, TextDelta):
            self.moments.append(time.perf_counter())


def workers(model: Model) -> list[Worker]:
    """A reviewer and a writer on ``model``."""
    return [Worker(Agent(model, name=n, instructions=i)) for n, i in INSTRUCTIONS.items()]


async def in_parallel(team: Sequence[Worker]) -> float:
    """Let all work at the same time; seconds until the last has finished."""
    began = time.perf_counter()
    async with anyio.create_task_group() as group:
        for worker in team:
            group.start_soon(worker.work)
    return time.perf_counter() - began


async def in_turn(team: Sequence[Worker]) -> float:
    """Let one work after the other; seconds until the last has finished."""
    began = time.perf_counter()
    for worker in team:
        await worker.work()
    return time.perf_counter() - began


def strip(worker: Worker, begin: float, end: float, width: int = 60) -> str:
    """When the worker's text arrived between ``begin`` and ``end``: a mark for each moment."""
    cells = {int((moment - begin) / (end - begin) * (width - 1)) for moment in worker.moments}
    return "".join("#" if cell in cells else "." for cell in range(width))


async def compare(model: Model) -> tuple[list[Worker], float, float]:
    """The same work in parallel and in turn: the parallel workers, and the seconds of both."""
    team = workers(model)
    parallel_s = await in_parallel(team)
    # Second, and so with the prompts in the cache: the comparison does not flatter the batch.
    turn_s = await in_turn(workers(model))
    return team, parallel_s, turn_s


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Two agents at the same time on one engine.")
    parser.add_argument("--model", default="qwen2.5-coder-0.5b")
    parser.add_argument("--threads", type=int, help="of the engine; all cores by default")
    parser.add_argument("--max-tokens", type=int, default=80, help="of one step")
    args = parser.parse_args(argv)
    model = DSparkModel(args.model, threads=args.threads, settings={"max_tokens": args.max_tokens})

    async def run() -> tuple[list[Worker], float, float]:
        async with model:
            await model.load()
            return await compare(model)

    team, parallel_s, turn_s = anyio.run(run)
    times = [moment for worker in team for moment in worker.moments]
    for worker in team:
        print(f"{worker.agent.name:<10}{strip(worker, min(times), max(times))}")
    for worker in team:
        assert worker.result is not None
        print(f"\n{worker.agent.name}: {worker.result.output}")
    print(f"\nin parallel {parallel_s:.2f} s, one after the other {turn_s:.2f} s")


if __name__ == "__main__":
    main()
