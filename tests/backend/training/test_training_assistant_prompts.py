"""Prompts made for training: many, different, of every kind, and none of a benchmark's."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import pytest

from dspark_backend.bench.jsonl import shipped
from dspark_backend.training import assistant_prompts as made
from dspark_backend.training.prompts import read_prompts


def test_requests_are_many_and_the_same_for_a_seed() -> None:
    requests = made.assistant_prompts(3)
    assert requests == made.assistant_prompts(3)
    assert requests != made.assistant_prompts(4)
    assert len(requests) > 3000
    assert len(set(requests)) > 0.99 * len(requests)
    shown = sum("```python" in text for text in requests)
    assert 0.2 < shown / len(requests) < 0.5
    assert not any("{}" in text.split("```")[0] for text in requests)


def test_shown_functions_are_whole() -> None:
    functions = list(made.standard_functions())
    assert len(functions) > 1000
    for code in functions:
        (node,) = ast.parse(code).body
        assert isinstance(node, ast.FunctionDef)


def test_no_request_is_one_of_the_benchmarks() -> None:
    lines = shipped("prompts", "code", ".jsonl").read_text("utf-8").splitlines()
    asked = {json.loads(line)["messages"][0]["content"] for line in lines}
    assert not asked & set(made.assistant_prompts())


def test_the_command_writes_what_training_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "prompts.jsonl"
    monkeypatch.setattr(sys, "argv", ["assistant_prompts", "--count", "50", "--out", str(out)])
    made.main()
    prompts = read_prompts(out)
    assert [p.messages[0]["content"] for p in prompts] == made.assistant_prompts()[:50]
    assert {p.source for p in prompts} == {"assistant"}
