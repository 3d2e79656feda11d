"""Work in parallel: in order, no more at once than allowed, nothing left behind."""

from __future__ import annotations

from functools import partial

import anyio
import pytest

from dspark_agent import Agent, RunContext, TestModel, ToolCallPart, UserError, fan_out
from dspark_agent.models.testing import FunctionModel

pytestmark = pytest.mark.anyio


class Gauge:
    """Counts how many jobs are at work, and how many at most were."""

    def __init__(self) -> None:
        self.now = 0
        self.most = 0
        self.begun = 0

    async def job(self, n: int, seconds: float = 0.001) -> int:
        self.now += 1
        self.begun += 1
        self.most = max(self.most, self.now)
        try:
            await anyio.sleep(seconds * (1 + n % 3))
        finally:
            self.now -= 1
        if n < 0:
            raise ValueError(f"job {n}")
        return n * n


@pytest.mark.parametrize("limit", [1, 3, 100, None])
async def test_results_are_in_order_and_the_limit_holds(limit: int | None) -> None:
    gauge = Gauge()
    jobs = [partial(gauge.job, n) for n in range(20)]
    assert await fan_out(jobs, max_concurrency=limit) == [n * n for n in range(20)]
    assert gauge.most == min(20, limit or 20)


async def test_the_first_failure_cancels_the_rest_and_comes_out_bare() -> None:
    gauge = Gauge()
    jobs = [partial(gauge.job, -1), *(partial(gauge.job, n, 60) for n in range(5))]
    with pytest.raises(ValueError, match="job -1"):
        await fan_out(jobs, max_concurrency=3)
    assert gauge.now == 0
    assert gauge.begun == 3


async def test_failures_can_be_results() -> None:
    gauge = Gauge()
    jobs = [partial(gauge.job, n) for n in (2, -1, 3)]
    two, failure, three = await fan_out(jobs, max_concurrency=2, return_exceptions=True)
    assert (two, three) == (4, 9)
    assert isinstance(failure, ValueError)


async def test_cancelling_leaves_nothing_running() -> None:
    gauge = Gauge()
    with anyio.move_on_after(0.02) as scope:
        await fan_out([partial(gauge.job, n, 60) for n in range(9)], max_concurrency=4)
    assert scope.cancelled_caught
    assert gauge.now == 0
    assert gauge.begun == 4


async def test_nothing_to_do_is_done() -> None:
    assert await fan_out([]) == []


async def test_a_limit_below_one_is_refused() -> None:
    with pytest.raises(UserError, match="max_concurrency=0"):
        await fan_out([], max_concurrency=0)


async def test_runs_fanned_out_in_a_tool_count_in_the_run() -> None:
    worker = Agent(TestModel(custom_output_text="ok"))

    async def spread(ctx: RunContext[object]) -> int:
        """Spread the work."""
        jobs = [partial(worker.run, f"Part {n}", parent=ctx) for n in range(5)]
        return len(await fan_out(jobs, max_concurrency=2))

    def answer(messages: object, turn: object) -> ToolCallPart | str:
        return ToolCallPart(tool_name="spread") if len(messages) == 1 else "done"  # type: ignore[arg-type]

    result = await Agent(FunctionModel(answer), tools=[spread]).run("Go")
    assert result.usage.requests == 7
