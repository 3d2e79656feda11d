"""Evaluation: a data set of cases, functions that score the answers, and reports to compare."""

from __future__ import annotations

from dspark_agent.evals.comparison import Comparison, LatencyChange, ScoreChange
from dspark_agent.evals.dataset import Case, Dataset, Scorer
from dspark_agent.evals.report import Attempt, CaseReport, EvaluationReport, Latency

__all__ = [
    "Attempt",
    "Case",
    "CaseReport",
    "Comparison",
    "Dataset",
    "EvaluationReport",
    "Latency",
    "LatencyChange",
    "ScoreChange",
    "Scorer",
]
