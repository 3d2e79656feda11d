"""Grammars over the tiny tokenizer, and how well outcomes follow a distribution."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from dspark_backend.catalog.files import ModelFiles, open_checkpoint
from dspark_backend.grammar.compile import Grammar, GrammarCompiler


@pytest.fixture(scope="session")
def tiny_files(tiny_checkpoint: Callable[..., Path]) -> ModelFiles:
    return open_checkpoint("tiny", tiny_checkpoint("qwen3"))


@pytest.fixture(scope="session")
def lark(tiny_files: ModelFiles) -> Callable[[str], Grammar]:
    """Compiles a grammar for the tiny model, whose vocabulary is 512."""
    compiler = GrammarCompiler(tiny_files.tokenizer(), vocab_size=512)
    return compiler.compile_lark


@pytest.fixture(scope="session")
def sigmas() -> Callable[[Iterable[Any], Mapping[Any, float]], float]:
    """How far outcomes are from their probabilities: a chi-squared statistic as standard deviations
    of a normal variable (Wilson and Hilferty 1931). What is expected less than five times is
    pooled; an outcome that cannot be is infinitely far."""

    def distance(outcomes: Iterable[Any], probabilities: Mapping[Any, float]) -> float:
        counts = Counter(outcomes)
        if any(probabilities.get(outcome, 0.0) == 0.0 for outcome in counts):
            return math.inf
        total = sum(counts.values())
        seen: Counter[Any] = Counter()
        wanted: Counter[Any] = Counter()
        for outcome, p in probabilities.items():
            cell = outcome if p * total >= 5 else "rare"
            seen[cell] += counts[outcome]
            wanted[cell] += p * total  # type: ignore[assignment]
        statistic = sum((seen[c] - wanted[c]) ** 2 / wanted[c] for c in wanted if wanted[c])
        freedom = len(wanted) - 1
        spread = 2 / (9 * freedom)
        return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)

    return distance
