"""Two evaluations of the same cases, side by side."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dspark_agent.errors import UserError
from dspark_agent.evals.report import CaseReport, EvaluationReport, Latency

LATENCIES = ("seconds", "model_s", "tool_s", "ttft_s", "new_tokens")
"""The fields of :class:`Latency` that are compared."""


@dataclass(frozen=True, slots=True)
class ScoreChange:
    """A score's means over the common cases, and in how many of them it rose or fell.

    ``p_value`` is that of the exact two-sided sign test: how likely as lopsided a split is by
    chance, were rising and falling as likely.
    """

    name: str
    before: float
    after: float
    better: int
    worse: int

    @property
    def p_value(self) -> float:
        changed = self.better + self.worse
        tail = sum(math.comb(changed, k) for k in range(min(self.better, self.worse) + 1))
        return min(1.0, 2 * tail / (1 << changed))


@dataclass(frozen=True, slots=True)
class LatencyChange:
    """Medians over the common cases, and the median of the cases' own ratios, after over before;
    None where a case has nothing to divide by."""

    name: str
    before: float
    after: float
    ratio: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """``after`` beside ``before``, on the cases that both have. Repeated attempts at a case count
    as their mean. ``missing`` are the cases that only one of them has."""

    before: EvaluationReport
    after: EvaluationReport
    cases: tuple[str, ...]
    missing: tuple[str, ...]
    scores: tuple[ScoreChange, ...]
    latencies: tuple[LatencyChange, ...]

    def table(self) -> str:
        """Quality and latency side by side, then the cases that changed, in Markdown."""
        from dspark_agent.evals.table import comparison_table

        return comparison_table(self)


def compare(before: EvaluationReport, after: EvaluationReport) -> Comparison:
    """See :meth:`EvaluationReport.compare`."""
    old, new = by_case(before), by_case(after)
    common = [name for name in new if name in old]
    if not common:
        raise UserError(
            f"reports {before.name!r} (of {before.dataset!r}) and {after.name!r} (of "
            f"{after.dataset!r}) have no case in common"
        )
    names = dict.fromkeys((*before.score_names, *after.score_names))
    return Comparison(
        before=before,
        after=after,
        cases=tuple(common),
        missing=tuple(name for name in (*old, *new) if (name in old) != (name in new)),
        scores=tuple(_score_change(name, common, old, new) for name in names),
        latencies=tuple(_latency_change(name, common, old, new) for name in LATENCIES),
    )


def by_case(report: EvaluationReport) -> dict[str, list[CaseReport]]:
    """The attempts at each case."""
    cases: dict[str, list[CaseReport]] = {}
    for case in report.cases:
        cases.setdefault(case.name, []).append(case)
    return cases


def case_score(attempts: Sequence[CaseReport], name: str) -> float:
    """A case's score: the mean of its attempts, a failed one counting 0."""
    return statistics.fmean(attempt.scores.get(name, 0.0) for attempt in attempts)


def case_latency(attempts: Sequence[CaseReport], name: str) -> float:
    """A case's latency: the mean of its attempts."""
    return statistics.fmean(_field(attempt.latency, name) for attempt in attempts)


_ByCase = Mapping[str, Sequence[CaseReport]]


def _score_change(name: str, common: Sequence[str], old: _ByCase, new: _ByCase) -> ScoreChange:
    before = [case_score(old[case], name) for case in common]
    after = [case_score(new[case], name) for case in common]
    pairs = list(zip(before, after, strict=True))
    return ScoreChange(
        name=name,
        before=statistics.fmean(before),
        after=statistics.fmean(after),
        better=sum(b < a for b, a in pairs),
        worse=sum(b > a for b, a in pairs),
    )


def _latency_change(name: str, common: Sequence[str], old: _ByCase, new: _ByCase) -> LatencyChange:
    before = [case_latency(old[case], name) for case in common]
    after = [case_latency(new[case], name) for case in common]
    ratios = [a / b for b, a in zip(before, after, strict=True) if b > 0]
    return LatencyChange(
        name=name,
        before=statistics.median(before),
        after=statistics.median(after),
        ratio=statistics.median(ratios) if ratios else None,
    )


def _field(latency: Latency, name: str) -> float:
    return float(getattr(latency, name))
