"""Tool that runs a project's tests with pytest and reports them briefly.

A full pytest log costs a small model most of its context and attention. The report has the
counts, then for each of the first failures the lines that matter: where, the source line, and
pytest's explanation of the assertion.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from dspark_agent import FunctionToolset
from dspark_tools.process import ProcessLimits, ProcessResult, run_process
from dspark_tools.workspace import Workspace, WorkspaceError, split_name

_NO_TESTS = 5
"""pytest's exit status when nothing was collected."""

_CONFIG_FILES = ("pytest.ini", ".pytest.ini", "pyproject.toml", "tox.ini", "setup.cfg")

_LIMITS = ProcessLimits(timeout_s=120.0)


@dataclass(frozen=True, slots=True)
class Failure:
    """A test that failed, or a file that could not be collected.

    Attributes:
        test: pytest's id of it, such as ``test_calc.py::test_add``.
        details: Where it failed, the source line, and the lines of the assertion or exception.
    """

    test: str
    details: str


@dataclass(frozen=True, slots=True)
class Report:
    """What a test run found.

    Attributes:
        passed: Number of tests that passed.
        failures: The tests that failed, in the order of the run.
        skipped: Number of tests that were skipped or failed as expected.
        problem: Why there is no result, or none to rely on (a usage error, the time limit, no
            tests), with the end of pytest's output; None when the run went through.
        seconds: Wall clock.
    """

    passed: int
    failures: tuple[Failure, ...]
    skipped: int
    problem: str | None
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether tests ran and none failed."""
        return self.problem is None and not self.failures and self.passed > 0

    def text(self, max_failures: int = 5) -> str:
        """The report as a model reads it; details of the first ``max_failures`` failures."""
        if self.problem is not None and not self.failures:
            return self.problem
        if not self.failures:
            if not self.passed:
                return f"No test ran: {self.skipped} skipped."
            return f"All {self.passed} tests passed."
        lines = [f"{len(self.failures)} failed, {self.passed} passed."]
        for failure in self.failures[:max_failures]:
            lines += ["", f"FAILED {failure.test}", failure.details]
        rest = [failure.test for failure in self.failures[max_failures:]]
        if rest:
            lines += ["", "Also failed: " + ", ".join(rest)]
        if self.problem is not None:
            lines += ["", self.problem]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Pytest:
    """The test tool of a workspace: ``python -m pytest`` of this interpreter, in its root.

    A project without pytest settings of its own gets none from the folders above it.

    Attributes:
        workspace: The project.
        limits: What one run may use.
        plugins: Whether installed pytest plugins are loaded; without them a run starts sooner.
        max_detail_lines: Lines of detail kept for one failure.
    """

    workspace: Workspace
    limits: ProcessLimits = _LIMITS
    plugins: bool = True
    max_detail_lines: int = 14

    def toolset(self) -> FunctionToolset:
        """The test tool as a toolset."""
        return FunctionToolset([self.run_tests], id="tests")

    async def run_tests(self, target: str = ".") -> str:
        """Run the tests of the workspace with pytest; tells which failed, and why.

        Args:
            target: What to run: "." for all tests, a test file, or one test as "file.py::test".
        """
        return (await self.report(target)).text()

    async def report(self, target: str = ".") -> Report:
        """As :meth:`run_tests`, with the result as a value.

        Raises:
            WorkspaceError: ``target`` is not below the workspace.
        """
        file, *test = target.split("::")
        name = "/".join(split_name(file)) or "."
        if name.startswith("-"):
            raise WorkspaceError(f"{target!r} is not a test; options cannot be given.")
        with tempfile.TemporaryDirectory(prefix="dspark-tests-") as folder:
            xml = Path(folder, "report.xml")
            command = [sys.executable, "-m", "pytest", "--tb=short", "--color=no", "--no-header"]
            command += ["-p", "no:cacheprovider", "-o", "junit_family=xunit1", f"--junitxml={xml}"]
            command += ["--rootdir", str(self.workspace.root), *self._own_settings()]
            command.append("::".join([name, *test]))
            result = await run_process(
                command,
                folder=self.workspace.root,
                limits=self.limits,
                environment={} if self.plugins else {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
            )
            return self._read(result, xml)

    def _own_settings(self) -> list[str]:
        has_settings = any((self.workspace.root / name).is_file() for name in _CONFIG_FILES)
        return [] if has_settings else ["-c", "/dev/null"]

    def _read(self, result: ProcessResult, xml: Path) -> Report:
        cases = list(_cases(xml))
        failures: list[Failure] = []
        skipped = 0
        for case in cases:
            found = case.find("failure")
            if found is None:
                found = case.find("error")
            if found is not None:
                failures.append(Failure(_test_id(case), self._shorten(found.text or "")))
            elif case.find("skipped") is not None:
                skipped += 1
        return Report(
            passed=len(cases) - len(failures) - skipped,
            failures=tuple(failures),
            skipped=skipped,
            problem=_problem(result, bool(cases)),
            seconds=result.seconds,
        )

    def _shorten(self, details: str) -> str:
        lines = [line for line in details.splitlines() if line.strip(" ^~")]
        if len(lines) <= self.max_detail_lines:
            return "\n".join(lines)
        # The test's own line comes first, the reason last; frames in between matter least.
        return "\n".join([*lines[:2], "...", *lines[-(self.max_detail_lines - 3) :]])


def _cases(xml: Path) -> Iterator[ElementTree.Element]:
    """The test cases of pytest's XML report; none when the run wrote no readable one."""
    try:
        yield from ElementTree.parse(xml).iter("testcase")
    except (FileNotFoundError, ElementTree.ParseError):
        return


def _test_id(case: ElementTree.Element) -> str:
    name = case.get("name", "")
    file = case.get("file")
    # A file that could not be collected has its name in the place of a test's.
    return f"{file}::{name}" if file else f"{case.get('classname') or name}"


def _problem(result: ProcessResult, has_cases: bool) -> str | None:
    if result.stopped:
        return f"The test run was stopped: {result.stopped}.\n{_end_of(result.output)}"
    if result.status == _NO_TESTS:
        return "No tests were found."
    if result.status in (0, 1) or (result.status == 2 and has_cases):
        return None
    return f"pytest could not run (exit status {result.status}):\n{_end_of(result.output)}"


def _end_of(output: str, lines: int = 12) -> str:
    return "\n".join(output.strip().splitlines()[-lines:])
