"""Fixtures of the SDK's and the command line's tests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from dspark_agent.cli.console import err, out


@pytest.fixture(autouse=True)
def consoles() -> Iterator[None]:
    """A console asks for the terminal's width once: each test has its own, whoever printed
    before."""
    out.cache_clear()
    err.cache_clear()
    yield
    out.cache_clear()
    err.cache_clear()


@pytest.fixture
def talk(tmp_path: Path) -> Path:
    """A recorded run of one short step, as a trace file."""
    step = {
        "messages": [{"role": "user", "content": "Hello"}],
        "tool_choice": "none",
        "max_new_tokens": 6,
    }
    path = tmp_path / "talk.jsonl"
    path.write_text(json.dumps({"name": "talk", "steps": [step]}) + "\n")
    return path
