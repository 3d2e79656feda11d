"""The bug-fix example on the real small model: its steps and their types, not its wits."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from dspark_agent import DSparkModel, StepKind
from dspark_backend.engine import Engine
from dspark_tools.tasks import load_task

PATH = Path(__file__).resolve().parents[2] / "examples" / "fix_failing_test.py"


@pytest.mark.real_model
@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_the_bug_is_looked_for_and_the_function_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("examples_fix_failing_test", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    task = load_task("average")
    with Engine.load("smollm2-135m", max_context=2048, threads=1) as engine:
        model = DSparkModel("smollm2-135m", engine=engine, settings={"max_tokens": 96})
        result = await module.fix(model, task, tmp_path, rounds=1)

    looked = [step.tool_calls[0] for step in result.steps[:2]]
    assert [call.tool_name for call in looked] == ["run_tests", "read_file"]
    assert looked[1].args["path"] == "stats.py"
    assert all(step.kind is StepKind.TOOL_CALL for step in result.steps)
    assert result.rounds == 1
    assert result.fixed is result.report.ok
    if not result.fixed:
        assert (tmp_path / "stats.py").read_text() == task.files["stats.py"]
    printed = capsys.readouterr().out
    assert printed.startswith(task.instruction)
    assert "FAILED test_stats.py::test_average_with_fraction" in printed
    assert "[step 1:" in printed
