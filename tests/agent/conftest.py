"""Fixtures of the SDK's and the command line's tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


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
