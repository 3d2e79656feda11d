"""Several pieces of work at the same time, no more than so many of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Literal, TypeVar, overload

import anyio

from dspark_agent.errors import UserError

T = TypeVar("T")


@overload
async def fan_out(
    jobs: Iterable[Callable[[], Awaitable[T]]],
    *,
    max_concurrency: int | None = None,
    return_exceptions: Literal[False] = False,
) -> list[T]: ...
@overload
async def fan_out(
    jobs: Iterable[Callable[[], Awaitable[T]]],
    *,
    max_concurrency: int | None = None,
    return_exceptions: bool,
) -> list[T | Exception]: ...
async def fan_out(
    jobs: Iterable[Callable[[], Awaitable[T]]],
    *,
    max_concurrency: int | None = None,
    return_exceptions: bool = False,
) -> list[T] | list[T | Exception]:
    """Run ``jobs`` at the same time, at most ``max_concurrency`` of them; their results in order.

    A job is a function without arguments: ``partial(agent.run, prompt, parent=ctx)``. Runs on one
    embedded model share its passes. The first failure cancels the other jobs and is raised as it
    is; with ``return_exceptions`` a failure takes its job's place among the results instead.
    Nothing is left running, whatever ends this.

    Raises:
        UserError: ``max_concurrency`` is less than one.
    """
    if max_concurrency is not None and max_concurrency < 1:
        raise UserError(f"fan_out(max_concurrency={max_concurrency}): must be at least 1")
    waiting = list(jobs)
    results: dict[int, T | Exception] = {}
    failures: list[Exception] = []
    queue = iter(enumerate(waiting))

    async def work() -> None:
        for index, job in queue:
            try:
                results[index] = await job()
            except Exception as error:
                if not return_exceptions:
                    failures.append(error)
                    group.cancel_scope.cancel()
                    return
                results[index] = error

    async with anyio.create_task_group() as group:
        for _ in range(min(len(waiting), max_concurrency or len(waiting))):
            group.start_soon(work)
    if failures:
        raise failures[0]
    return [results[index] for index in range(len(waiting))]
