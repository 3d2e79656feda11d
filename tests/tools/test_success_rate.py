"""The success rate counts what the model fixes, and in which round."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from dspark_agent import FunctionModel, ModelTurn, ToolCallPart
from dspark_agent.evals import Attempt, Case, CaseReport, EvaluationReport, Latency
from dspark_agent.models.testing import Messages
from dspark_tools import success_rate as command
from dspark_tools.success_rate import Outcome, fixed, main, success_rate, table
from dspark_tools.tasks import load_task

TASKS = [load_task("average"), load_task("clamp")]


def knows_averages(messages: Messages, turn: ModelTurn) -> ToolCallPart | str:
    """A model that can write one function only."""
    if turn.tool_choice in ("none", "run_tests"):
        return ToolCallPart(tool_name="run_tests") if turn.tools else "No idea."
    (tool,) = (tool for tool in turn.tools if tool.name == turn.tool_choice)
    properties = tool.parameters["properties"]
    args = {name: schema["const"] for name, schema in properties.items() if "const" in schema}
    if tool.name == "read_file":
        args["path"] = properties["path"]["enum"][0]
    elif args["path"] == "stats.py":
        args["code"] = "def average(values):\n    return sum(values) / len(values)"
    else:
        args["code"] = "def clamp(value, low, high):\n    return value"
    return ToolCallPart(tool_name=tool.name, args=args)


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_report_tells_the_round_of_the_fix_and_what_it_took() -> None:
    report = await success_rate(FunctionModel(knows_averages), TASKS, rounds=1)

    assert [(case.name, case.output) for case in report.cases] == [
        ("average", {"rounds": 1}),
        ("clamp", {"rounds": None}),
    ]
    assert report.mean("fixed") == report.mean("fixed_at_once") == 0.5
    assert not report.errors
    for case in report.cases:
        assert case.latency.steps == 4  # run the tests, read, write, run the tests
        assert 0 < case.latency.tool_s < case.latency.seconds


def report(*rounds: int | None) -> EvaluationReport:
    cases = [
        CaseReport(
            name=task.name,
            scores=fixed(Attempt(Case(task.name, task), Outcome(count), Latency(seconds=1))),
            output={"rounds": count},
            latency=Latency(seconds=1),
        )
        for task, count in zip(TASKS, rounds, strict=True)
    ]
    return EvaluationReport(
        dataset="bug fixes",
        name="made up",
        started_at=datetime(2026, 1, 1, tzinfo=UTC),
        max_concurrency=1,
        cases=tuple(cases),
    )


def test_table_has_a_column_for_each_model() -> None:
    shown = table(TASKS, {"small": report(1, None), "large": report(2, 5)})

    assert shown.splitlines() == [
        "| task | bug | small | large |",
        "|---|---|---|---|",
        "| average | integer division | 1 | 2 |",
        "| clamp | swapped functions | - | 5 |",
        "| fixed in the first round | | 1 of 2 | 0 of 2 |",
        "| fixed in two rounds | | 1 of 2 | 1 of 2 |",
        "| fixed in the end | | 1 of 2 | 2 of 2 |",
    ]


def test_a_baseline_that_is_none_is_named_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "old.json"
    file.write_text("[]")
    with pytest.raises(SystemExit):
        main(["--model", "no-such-model", "--baseline", str(file)])
    assert "old.json is not an evaluation report" in capsys.readouterr().err


def test_models_are_reported_and_compared_with_a_baseline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "load_tasks", lambda: tuple(TASKS))
    monkeypatch.setattr(command, "infer_model", lambda _: FunctionModel(knows_averages))
    report(2, 1).write(tmp_path / "old.json")

    main(["--model", "m", "--rounds", "1", "--out", str(tmp_path / "new"),
          "--baseline", str(tmp_path / "old.json")])  # fmt: skip

    shown = capsys.readouterr().out
    assert "| average | integer division | 1 |" in shown
    assert "0 / 1" in shown  # the clamp is no longer fixed
    assert EvaluationReport.read(tmp_path / "new" / "m.json").mean("fixed") == 0.5
