"""What an evaluation found: values that are written as JSON and compared with earlier ones."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from typing_extensions import TypeVar

from dspark_agent.errors import UserError
from dspark_agent.trace import StepTrace

if TYPE_CHECKING:
    from dspark_agent.evals.comparison import Comparison
    from dspark_agent.evals.dataset import Case

InT = TypeVar("InT", default=Any)
OutT = TypeVar("OutT", default=Any)


class _Report(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Latency(_Report):
    """What one attempt took. ``seconds`` is its wall clock; the others are sums over the steps of
    all agents in it, so that of parallel ones they may exceed it."""

    seconds: float
    steps: int = 0
    model_s: float = 0.0
    tool_s: float = 0.0
    ttft_s: float = 0.0
    new_tokens: int = 0
    prefill_new_tokens: int = 0
    prefill_cached_tokens: int = 0

    @classmethod
    def of(cls, seconds: float, traces: Iterable[StepTrace]) -> Latency:
        """The account of the steps, and of those that were taken inside their tools."""
        steps = [step for trace in traces for step in _all(trace)]
        accounts = [step.metrics for step in steps if step.metrics is not None]
        tools = sum(a.tool_s for a in accounts)
        return cls(
            seconds=seconds,
            steps=len(steps),
            model_s=sum(a.total_s for a in accounts) - tools,
            tool_s=tools,
            ttft_s=sum(a.ttft_s for a in accounts),
            new_tokens=sum(a.new_tokens for a in accounts),
            prefill_new_tokens=sum(a.prefill_new_tokens for a in accounts),
            prefill_cached_tokens=sum(a.prefill_cached_tokens for a in accounts),
        )


@dataclass(frozen=True, slots=True)
class Attempt(Generic[InT, OutT]):
    """One answer to a case, as scorers see it."""

    case: Case[InT]
    output: OutT
    latency: Latency


class CaseReport(_Report):
    """One attempt at a case.

    ``error`` is the exception that ended it, ``scores`` are empty then. ``output`` is as JSON has
    it.
    """

    name: str
    repeat: int = 0
    scores: Mapping[str, float] = Field(default_factory=dict)
    error: str | None = None
    output: Any = None
    latency: Latency


class EvaluationReport(_Report):
    """An evaluation of one task, ``name``, on a data set; ``cases`` in the data set's order."""

    dataset: str
    name: str
    started_at: datetime
    max_concurrency: int
    cases: tuple[CaseReport, ...]

    @property
    def score_names(self) -> tuple[str, ...]:
        """What was scored, in the order of its first appearance."""
        return tuple(dict.fromkeys(name for case in self.cases for name in case.scores))

    def mean(self, score: str) -> float:
        """Mean of a score over all attempts; one that failed, or has no such score, counts 0.

        Raises:
            UserError: nothing has that score.
        """
        if score not in self.score_names:
            there_are = ", ".join(self.score_names) or "none"
            raise UserError(f"report {self.name!r} has no score {score!r}; it has: {there_are}")
        return sum(case.scores.get(score, 0.0) for case in self.cases) / len(self.cases)

    @property
    def errors(self) -> tuple[CaseReport, ...]:
        """The attempts that failed."""
        return tuple(case for case in self.cases if case.error is not None)

    def median(self, quantity: str = "seconds") -> float:
        """Median of a field of :class:`Latency` over all attempts."""
        return float(statistics.median(getattr(case.latency, quantity) for case in self.cases))

    def compare(self, baseline: EvaluationReport) -> Comparison:
        """This run beside an earlier one, case by case.

        Raises:
            UserError: they have no case in common.
        """
        from dspark_agent.evals.comparison import compare

        return compare(baseline, self)

    def table(self) -> str:
        """A row for each attempt and their summary, in Markdown."""
        from dspark_agent.evals.table import report_table

        return report_table(self)

    def write(self, path: str | Path) -> None:
        """Write it as JSON, for :meth:`read`."""
        Path(path).write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> EvaluationReport:
        """What :meth:`write` wrote.

        Raises:
            UserError: the file holds something else; the message says where.
            OSError: it cannot be read.
        """
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the file"
            raise UserError(
                f"{path} is not an evaluation report: {place}: {first['msg']}"
            ) from error


def _all(trace: StepTrace) -> Iterable[StepTrace]:
    yield trace
    for child in trace.nested:
        yield from _all(child)
