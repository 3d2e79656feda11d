"""The examples run on the real small model; what it has to say does not matter here."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from dspark_agent import DSparkModel, RetryPromptPart, StepKind
from dspark_backend.engine import Engine

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def example(name: str) -> ModuleType:
    """An example as a module; they are scripts beside the packages."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses and pydantic look up annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.load("smollm2-135m", max_context=2048, threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def model(engine: Engine) -> DSparkModel:
    return DSparkModel("smollm2-135m", engine=engine, settings={"max_tokens": 160})


@pytest.mark.real_model
@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_function_is_written_again_until_the_tries_are_used_up(
    model: DSparkModel, tmp_path: Path
) -> None:
    module = example("write_function_from_tests")
    steps = await module.write_function(model, tmp_path, tries=2, max_lines=2)
    assert 1 <= len(steps) <= 2
    for step in steps:
        assert step.kind is StepKind.TOOL_CALL
        written = step.tool_calls[0].args["code"].splitlines()
        assert written[0] == module.SIGNATURE
        assert 1 <= len(written[1:]) <= 2
        assert all(line.startswith("    ") for line in written[1:])
        assert step.metrics.tool_s > 0
    for refused in steps[:-1]:
        assert isinstance(refused.tool_results[0], RetryPromptPart)
        assert "failed" in (refused.retry_reason or "")
    assert steps[-1].retry_reason is None
    assert re.search(r"passed|failed|could not run", steps[-1].tool_result)
    assert (tmp_path / "years.py").read_text() == steps[-1].tool_calls[0].args["code"]


@pytest.mark.real_model
@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_extracted_orders_are_typed(
    model: DSparkModel, capsys: pytest.CaptureFixture[str]
) -> None:
    module = example("extract_typed_data")
    results = await module.extract_all(model)
    printed = capsys.readouterr().out
    assert len(results) == len(module.MAILS)
    for result in results:
        assert isinstance(result.output, module.Order)
        assert 1 <= len(result.output.items) <= 3
        assert result.output.customer in printed
        assert result.steps[-1].metrics.accepted["forced"] > 0
    assert results[1].steps[-1].metrics.prefill_cached_tokens > 0


@pytest.mark.real_model
@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_two_agents_write_at_the_same_time(engine: Engine) -> None:
    module = example("two_agents_in_parallel")
    model = DSparkModel("smollm2-135m", engine=engine, settings={"max_tokens": 24})
    team, parallel_s, turn_s = await module.compare(model)
    first, second = (worker.moments for worker in team)
    assert max(first[0], second[0]) < min(first[-1], second[-1])
    assert sum(second[0] < moment < second[-1] for moment in first) >= 5
    for worker in team:
        (step,) = worker.result.steps
        assert step.metrics.new_tokens <= 24
        assert len(module.strip(worker, min(first[0], second[0]), max(first[-1], second[-1]))) == 60
    assert team[0].result.output != team[1].result.output
    assert parallel_s > 0
    assert turn_s > 0


@pytest.mark.real_model
@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_the_latency_table_has_a_line_for_each_kind_of_step(model: DSparkModel) -> None:
    module = example("measure_step_latency")
    found = await module.measure(model, rounds=2)
    assert set(found) == {StepKind.TOOL_CALL, StepKind.TYPED_RESULT, StepKind.TEXT}
    for metrics in found.values():
        assert len(metrics) == 2
        for each in metrics:
            assert each.parts_s == pytest.approx(each.total_s, rel=0.02)
    head, *lines = module.table(found).splitlines()
    assert [line.split()[0] for line in lines] == ["tool_call", "typed_result", "text"]
    assert all(title in head for title in module.COLUMNS)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_says_how_it_is_used(path: Path) -> None:
    shown = subprocess.run(
        [sys.executable, path, "--help"], capture_output=True, text=True, timeout=60
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stderr == ""
    assert "--model" in shown.stdout
