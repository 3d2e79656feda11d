"""run_tests reports what failed and why, briefly, and survives what projects do."""

from __future__ import annotations

from pathlib import Path

import pytest

from dspark_tools.process import ProcessLimits
from dspark_tools.tests import Pytest
from dspark_tools.workspace import Workspace, WorkspaceError

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.parametrize("anyio_backend", ["asyncio"]),  # test_process.py has both
]


def project(folder: Path, **files: str) -> Pytest:
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return Pytest(Workspace(folder), ProcessLimits(timeout_s=60), plugins=False)


async def test_passing_tests(tmp_path: Path) -> None:
    tool = project(tmp_path, test_a="def test_one():\n    pass\n\ndef test_two():\n    pass\n")

    assert await tool.run_tests() == "All 2 tests passed."
    assert (await tool.report()).ok
    assert [path.name for path in tmp_path.iterdir()] == ["test_a.py"]  # no cache left behind


async def test_failure_has_place_source_line_and_assertion(tmp_path: Path) -> None:
    tool = project(
        tmp_path,
        calc="def add(a, b):\n    return a - b\n",
        test_calc=(
            "from calc import add\n\ndef test_add():\n    assert add(2, 2) == 4\n\n"
            "def test_zero():\n    assert add(0, 0) == 0\n"
        ),
    )

    assert await tool.run_tests() == (
        "1 failed, 1 passed.\n\n"
        "FAILED test_calc.py::test_add\n"
        "test_calc.py:4: in test_add\n"
        "    assert add(2, 2) == 4\n"
        "E   assert 0 == 4\n"
        "E    +  where 0 = add(2, 2)"
    )


async def test_exception_in_the_module_is_located(tmp_path: Path) -> None:
    tool = project(
        tmp_path,
        calc="def mean(values):\n    return sum(values) / len(values)\n",
        test_calc="import calc\n\ndef test_empty():\n    assert calc.mean([]) == 0\n",
    )

    (failure,) = (await tool.report()).failures

    assert failure.details.splitlines() == [
        "test_calc.py:4: in test_empty",
        "    assert calc.mean([]) == 0",
        "calc.py:2: in mean",
        "    return sum(values) / len(values)",
        "E   ZeroDivisionError: division by zero",
    ]


async def test_syntax_error_is_a_failure_of_the_file(tmp_path: Path) -> None:
    tool = project(
        tmp_path,
        calc="def add(a, b)\n    return a + b\n",
        test_calc="from calc import add\n\ndef test_add():\n    assert add(1, 2) == 3\n",
    )

    report = await tool.report()

    assert not report.ok
    assert report.text().startswith("1 failed, 0 passed.\n\nFAILED test_calc")
    assert "SyntaxError: expected ':'" in report.text()


async def test_one_test_can_be_chosen(tmp_path: Path) -> None:
    tool = project(tmp_path, test_a="def test_one():\n    pass\n\ndef test_two():\n    assert 0\n")

    assert await tool.run_tests("test_a.py::test_one") == "All 1 tests passed."
    assert (await tool.run_tests("test_a.py::test_two")).startswith("1 failed, 0 passed.")


async def test_many_and_long_failures_are_shortened(tmp_path: Path) -> None:
    recursive = "def deep(n):\n    return deep(n - 1) if n else 1 / 0\n"
    tests = "".join(f"def test_{i}():\n    deep(60)\n" for i in range(7))
    tool = project(tmp_path, test_a=recursive + tests)

    text = await tool.run_tests()

    assert text.startswith("7 failed, 0 passed.")
    assert text.endswith("Also failed: test_a.py::test_5, test_a.py::test_6")
    assert len(text.splitlines()) <= 5 * (tool.max_detail_lines + 2) + 3
    assert text.count("E   ZeroDivisionError") == 5


async def test_skipped_tests_do_not_count_as_passed(tmp_path: Path) -> None:
    tool = project(
        tmp_path, test_a="import pytest\n\n@pytest.mark.skip\ndef test_one():\n    pass\n"
    )

    report = await tool.report()

    assert (report.passed, report.skipped, report.ok) == (0, 1, False)
    assert report.text() == "No test ran: 1 skipped."


async def test_folder_without_tests(tmp_path: Path) -> None:
    assert await project(tmp_path).run_tests() == "No tests were found."


async def test_missing_test_is_explained(tmp_path: Path) -> None:
    text = await project(tmp_path, test_a="def test_one():\n    pass\n").run_tests("test_b.py")

    assert text.startswith("pytest could not run (exit status 4)")
    assert "test_b.py" in text


@pytest.mark.parametrize("target", ["../x.py", "/etc", "--version", "-p=x"])
async def test_targets_outside_and_options_are_refused(tmp_path: Path, target: str) -> None:
    with pytest.raises(WorkspaceError):
        await project(tmp_path).run_tests(target)


async def test_endless_test_is_stopped(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text("def test_one():\n    while True:\n        pass\n")
    tool = Pytest(Workspace(tmp_path), ProcessLimits(timeout_s=3), plugins=False)

    report = await tool.report()

    assert not report.ok
    assert report.text().startswith("The test run was stopped: it ran longer than 3 seconds.")


async def test_settings_of_outer_folders_do_not_apply(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --no-such-option\n")
    inner = tmp_path / "project"
    inner.mkdir()

    assert await project(inner, test_a="def test_one():\n    pass\n").run_tests() == (
        "All 1 tests passed."
    )


async def test_own_settings_apply(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\npython_functions = check_*\n")

    assert await project(tmp_path, test_a="def check_it():\n    pass\n").run_tests() == (
        "All 1 tests passed."
    )


async def test_plugins_load_on_request(tmp_path: Path) -> None:
    test = "def test_one(request):\n    assert request.config.pluginmanager.hasplugin('anyio')\n"
    tool = project(tmp_path, test_a=test)

    assert "1 failed" in await tool.run_tests()
    assert await Pytest(tool.workspace).run_tests() == "All 1 tests passed."
