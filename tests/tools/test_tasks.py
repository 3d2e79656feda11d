"""Every bug-fix task fails because of its bug and passes with its reference fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from dspark_tools.tasks import BugFixTask, load_task, load_tasks, materialise
from dspark_tools.tests import Pytest

TASKS = load_tasks()


def test_there_are_enough_tasks() -> None:
    assert len(TASKS) >= 12
    assert len({task.bug for task in TASKS}) >= 12


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
async def test_fails_before_and_passes_after_the_fix(task: BugFixTask, tmp_path: Path) -> None:
    workspace = materialise(task, tmp_path)
    before = await Pytest(workspace, plugins=False).report()
    text = workspace.read_text(task.fix.file)
    assert text.count(task.fix.old) == 1
    workspace.write_text(task.fix.file, text.replace(task.fix.old, task.fix.new))
    after = await Pytest(workspace, plugins=False).report()

    assert before.problem is None
    assert before.failures
    assert after.ok
    assert after.passed == before.passed + len(before.failures)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_instruction_is_one_sentence_that_does_not_give_the_fix(task: BugFixTask) -> None:
    assert task.instruction.count(".") == 1
    assert task.instruction.endswith(".")
    assert task.fix.new.strip() not in task.instruction


def test_unknown_task_is_named() -> None:
    with pytest.raises(KeyError, match="no bug-fix task 'nothing'; there are: adult_age"):
        load_task("nothing")


def test_materialise_overwrites_nothing(tmp_path: Path) -> None:
    task = load_task("sum_to_n")
    (tmp_path / "test_series.py").write_text("mine")

    with pytest.raises(FileExistsError, match=r"test_series\.py exists"):
        materialise(task, tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == ["test_series.py"]
