"""A run is killed (SIGKILL) at every boundary of its journal, and another process goes on: nothing
is done twice, nothing is lost."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("durable_child.py")
DONE_ONCE = [
    *(f"model {step}" for step in range(5)),
    *(f"tool {call_id}" for call_id in ("n1", "n2", "f4", "n7", "r6")),
]
"""r5 was denied and n3 had wrong arguments: neither is run."""


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, PROGRAM, tmp_path_factory.mktemp("killed")],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def doubled(report: dict[str, Any]) -> list[str]:
    """What the kill may double: work whose end was done and not yet written, where doing it again
    is harmless. A model's answer is; so is a tool that says so."""
    killed = report["killed"]
    if killed is None or not report["before"]:
        return []
    if killed["kind"] == "model-output":
        return [f"model {killed['step']}"]
    if killed["kind"] == "tool-ended" and killed["outcome"].get("tool_call_id") == "f4":
        return ["tool f4"]
    return []


def test_every_boundary_is_killed_at_before_and_after(reports: list[dict[str, Any]]) -> None:
    for before in (False, True):
        some = [report for report in reports if report["before"] is before]
        kinds = [report["killed"]["kind"] for report in some[:-1]]
        assert [report["signal"] for report in some] == [signal.SIGKILL] * len(kinds) + [None]
        assert {kind: kinds.count(kind) for kind in set(kinds)} == {
            "run-begun": 1,
            "instructions": 1,
            "model-output": 5,
            "tool-begun": 5,
            "tool-ended": 8,
            "step-ended": 5,
            "decided": 1,
            "run-ended": 1,
        }


def test_nothing_is_done_twice_and_nothing_is_lost(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        assert sorted(report["ledger"]) == sorted(DONE_ONCE + doubled(report)), report


def test_the_outcome_is_that_of_a_run_nobody_killed(reports: list[dict[str, Any]]) -> None:
    whole = reports[-1]
    assert whole["signal"] is None
    for report in reports:
        assert report["output"] == "done"
        # The instructions name the process, and are those of the process that began the run.
        assert report["messages"][1:] == whole["messages"][1:]
        assert len({str(part) for part in report["messages"][0]}) == 2
        assert (report["requests"], report["tool_calls"]) == (5, 6)


def test_only_calls_whose_end_was_not_written_are_in_doubt(reports: list[dict[str, Any]]) -> None:
    asked = 0
    for report in reports:
        kind = None if report["killed"] is None else report["killed"]["kind"]
        asked += len(report["in_doubt"])
        if kind not in ("tool-begun", "tool-ended"):
            assert report["in_doubt"] == report["interrupted"] == []
        assert "f4" not in report["in_doubt"]
    assert asked > 0


def test_killed_processes_leave_nothing_beside_the_journal(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        assert set(report["left"]) <= {"killed", "ledger", "runs.sqlite", "told"}
