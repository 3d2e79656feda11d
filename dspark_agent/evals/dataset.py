"""Cases, the scorers of their answers, and the runner that puts a task to all of them."""

from __future__ import annotations

import inspect
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Generic

import anyio
import pydantic_core

from dspark_agent.errors import UserError
from dspark_agent.evals.report import Attempt, CaseReport, EvaluationReport, InT, Latency, OutT
from dspark_agent.trace import Recording

Score = bool | int | float | Mapping[str, float]
Scorer = Callable[[Attempt[InT, OutT]], Score | Awaitable[Score]]
"""A function of an :class:`Attempt`, sync or async: a number (or bool) that goes by the function's
name, or several by names of their own. More is better."""
OnCase = Callable[[CaseReport], None]


@dataclass(frozen=True, slots=True)
class Case(Generic[InT]):
    """One question: what the task is given, and what it should come to, where that is known."""

    name: str
    inputs: InT
    expected_output: Any = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


class Dataset(Generic[InT, OutT]):
    """Cases and scorers, to evaluate tasks on.

    Raises:
        UserError: there are no cases, or two of a name; two scorers of a name.
    """

    def __init__(
        self,
        cases: Sequence[Case[InT]],
        *,
        scorers: Sequence[Scorer[InT, OutT]] = (),
        name: str = "dataset",
    ) -> None:
        self.name = name
        self.cases = tuple(cases)
        self.scorers = tuple(scorers)
        if not self.cases:
            raise UserError(f"data set {name!r} has no cases")
        _unique(f"cases of data set {name!r}", [case.name for case in self.cases])
        _unique(f"scorers of data set {name!r}", [_name(scorer) for scorer in self.scorers])

    async def evaluate(
        self,
        task: Callable[[InT], Awaitable[OutT]],
        *,
        name: str | None = None,
        max_concurrency: int = 4,
        repeat: int = 1,
        timeout: float | None = None,
        on_case: OnCase | None = None,
    ) -> EvaluationReport:
        """Put ``task`` to every case and score what it comes to.

        An attempt that raises, or takes longer than ``timeout`` seconds, is reported with its
        error. All agents' steps inside count for its latency; with ``max_concurrency`` above 1,
        attempts slow each other down, so compare latencies of equal concurrency only.

        Args:
            task: called with a case's inputs.
            name: what the report calls it; the function's name by default.
            max_concurrency: how many attempts go on at the same time.
            repeat: attempts at each case.
            timeout: seconds that one attempt may take.
            on_case: told of each attempt when it is done.

        Raises:
            UserError: a scorer failed, or gave something that is not a score.
        """
        if max_concurrency < 1 or repeat < 1:
            raise UserError("max_concurrency and repeat must be at least 1")
        started = datetime.now(tz=UTC)
        jobs = [(case, number) for case in self.cases for number in range(repeat)]
        reports: dict[int, CaseReport] = {}
        failures: list[Exception] = []

        async def attempt(place: int, limiter: anyio.CapacityLimiter) -> None:
            case, number = jobs[place]
            async with limiter:
                try:
                    reports[place] = await self._attempt(task, case, number, timeout)
                    if on_case is not None:
                        on_case(reports[place])
                except Exception as error:  # raised bare below: a task group would wrap it
                    failures.append(error)
                    group.cancel_scope.cancel()

        limiter = anyio.CapacityLimiter(max_concurrency)
        async with anyio.create_task_group() as group:
            for place in range(len(jobs)):
                group.start_soon(attempt, place, limiter)
        if failures:
            raise failures[0]
        return EvaluationReport(
            dataset=self.name,
            name=name or _name(task),
            started_at=started,
            max_concurrency=max_concurrency,
            cases=tuple(reports[place] for place in range(len(jobs))),
        )

    async def _attempt(
        self,
        task: Callable[[InT], Awaitable[OutT]],
        case: Case[InT],
        repeat: int,
        timeout: float | None,
    ) -> CaseReport:
        began = time.perf_counter()
        error: Exception | None = None
        with Recording() as recording:
            try:
                with anyio.fail_after(timeout):
                    output = await task(case.inputs)
            except Exception as raised:
                error = raised
        latency = Latency.of(time.perf_counter() - began, recording.steps)
        if error is not None:
            said = f"{type(error).__name__}: {error}".removesuffix(": ")
            return CaseReport(name=case.name, repeat=repeat, error=said, latency=latency)
        found = Attempt(case, output, latency)
        scores: dict[str, float] = {}
        for scorer in self.scorers:
            scores |= await _scores(scorer, found)
        shown = pydantic_core.to_jsonable_python(output, fallback=str)
        return CaseReport(
            name=case.name, repeat=repeat, scores=scores, output=shown, latency=latency
        )


async def _scores(scorer: Scorer[InT, OutT], attempt: Attempt[InT, OutT]) -> dict[str, float]:
    where = f"scorer {_name(scorer)!r} on case {attempt.case.name!r}"
    try:
        given = scorer(attempt)
        score = await given if inspect.isawaitable(given) else given
    except Exception as error:
        raise UserError(f"{where} failed: {type(error).__name__}: {error}") from error
    named = score if isinstance(score, Mapping) else {_name(scorer): score}
    for value in named.values():
        if not isinstance(value, bool | int | float) or not math.isfinite(value):
            raise UserError(f"{where} gave {value!r}: give a finite number or a bool")
    return {name: float(value) for name, value in named.items()}


def _name(function: object) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _unique(what: str, names: Sequence[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{what}: two are called {twice[0]!r}")
