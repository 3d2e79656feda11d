"""A recipe: fix a bug in a small Python project, in steps so narrow that a small model can take
them.

What a small model does well and badly decides the steps. Shown wrong code, a 0.5B model copies it,
bug and all; told what a function promises and which tests it must pass, it writes the function
anew, and mostly right. So the conversation that looks (run the tests, read the module, name the
function) and the one that writes are two, and the writer never sees the old body. Each step offers
one tool; what is known already (the file, the function's name) is not the model's to choose.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Final

from dspark_agent import (
    Agent,
    AgentEvent,
    FunctionToolset,
    JsonSchema,
    Model,
    ModelSettings,
    Session,
    StepResult,
    ToolRetriesExceeded,
    UsageLimits,
)
from dspark_tools.files import Files
from dspark_tools.functions import (
    Functions,
    function_contract,
    function_names,
    function_pattern,
)
from dspark_tools.tests import Pytest, Report
from dspark_tools.workspace import Workspace

OnEvent = Callable[[AgentEvent], Awaitable[None] | None]

INSTRUCTIONS: Final = "You are a careful Python programmer."
MAX_NEW_TOKENS: Final = 256
GREEDY_ROUNDS: Final = 2
MAX_TESTS_CHARS: Final = 3000
"""How much of the tests the writer is shown."""


@dataclass(frozen=True, slots=True)
class BugFix:
    """What came of it.

    Attributes:
        fixed: Whether all tests pass now. If not, the change that left the fewest failures stays.
        rounds: How often code was written.
        report: The last test run.
        steps: All steps of the model, of all conversations, in order.
    """

    fixed: bool
    rounds: int
    report: Report
    steps: tuple[StepResult[Any], ...]


async def fix_bug(
    model: Model | str,
    workspace: Workspace,
    instruction: str,
    *,
    rounds: int = 8,
    temperature: float = 0.8,
    tests: Pytest | None = None,
    on_event: OnEvent | None = None,
) -> BugFix:
    """Runs the tests, finds the function that fails them, and has the model write it anew until
    they pass.

    Even rounds write the function anew from its signature, docstring and tests; odd ones first
    explain the bug, with the code in view. Two rounds are greedy; later ones sample, each with a
    seed of its own, so that the whole is reproducible, and leave default values open.

    Args:
        model: The model, or its name.
        workspace: The project: modules, and tests that pytest finds.
        instruction: What the user asks for.
        rounds: How often code is written at most.
        temperature: Of the sampled rounds.
        tests: How the tests are run; pytest with its defaults when left out.
        on_event: Called with each event of each step; steps are numbered through.
    """
    repair = _Repair(model, workspace, instruction, tests or Pytest(workspace), on_event)
    suspects = await repair.look()
    written = 0
    while suspects and written < rounds:
        sampling = ModelSettings(seed=written, min_p=0.1, temperature=0.0)
        if written >= GREEDY_ROUNDS:
            sampling["temperature"] = temperature
        suspect = suspects[written // 2 % len(suspects)]
        before, text = repair.report, workspace.read_text(suspect.path)
        await repair.write(suspect, written, sampling)
        written += 1
        if repair.report.ok:
            break
        if _badness(repair.report) < _badness(before):
            suspects = await repair.look()
        else:
            workspace.write_text(suspect.path, text)
            repair.report = before
    return BugFix(repair.report.ok, written, repair.report, tuple(repair.steps))


@dataclass(frozen=True, slots=True)
class _Suspect:
    """The function that is thought to be wrong."""

    path: str
    name: str


class _Repair:
    """The two conversations of a repair, and what they have found out so far."""

    def __init__(
        self,
        model: Model | str,
        workspace: Workspace,
        instruction: str,
        tests: Pytest,
        on_event: OnEvent | None,
    ) -> None:
        self.report = Report(passed=0, failures=(), skipped=0, problem="Not run yet.", seconds=0.0)
        self.steps: list[StepResult[Any]] = []
        self._workspace = workspace
        self._instruction = instruction
        self._tests = tests
        self._on_event = on_event
        tools = FunctionToolset([self.run_tests], id="repair")
        tools.add(Files(workspace).read_file)
        tools.add(Functions(workspace).rewrite_function)
        self._agent = Agent(
            model,
            instructions=INSTRUCTIONS,
            toolsets=[tools],
            retries=0,
            output_retries=1,
            model_settings={"max_tokens": MAX_NEW_TOKENS},
            # The tests are run again and again on purpose.
            limits=UsageLimits(repeat_call_limit=None),
        )
        self._thinker = Agent(
            model, instructions=INSTRUCTIONS, model_settings={"max_tokens": MAX_NEW_TOKENS}
        )

    async def run_tests(self) -> str:
        """Run the tests of the project; tells which failed, and why."""
        self.report = await self._tests.report()
        return self.report.text()

    async def look(self) -> list[_Suspect]:
        """Runs the tests, reads a module and names the functions that may be wrong, the likeliest
        first; none where all tests pass, or no function is to be found."""
        async with self._session(self._agent) as session:
            await session.step(self._instruction, tool_choice="run_tests")
            paths = _modules(self._workspace, self.report)
            if self.report.ok or not paths:
                return []
            span = {"first_line": 1, "last_line": Files(self._workspace).max_lines}
            step = await session.step(
                "Read the module that has the bug.",
                tool_choice="read_file",
                args={"path": JsonSchema({"enum": paths}), **span},
            )
            arguments = step.tool_calls[0].args
            assert isinstance(arguments, dict)  # anything else was refused as a call
            path = arguments["path"]
            names = _suspects(self._workspace.read_text(path), self.report)
            if len(names) > 1:
                choice = await session.step(
                    "Which function has the bug?", output_type=JsonSchema({"enum": names})
                )
                names.sort(key=lambda name: name != choice.output)
        return [_Suspect(path, name) for name in names]

    async def write(self, suspect: _Suspect, round_: int, sampling: ModelSettings) -> None:
        """Has the function written, and the tests run where that gave usable code."""
        text = self._workspace.read_text(suspect.path)
        name = suspect.name
        prompt = self._anew(
            suspect, function_contract(text, name, open_defaults=round_ >= GREEDY_ROUNDS)
        )
        code: object = JsonSchema({"type": "string", "pattern": function_pattern(text, name)})
        if round_ % 2 == 1:
            code = await self._think(suspect, text, sampling)
            prompt = f"Write the corrected {name}."
        async with self._session(self._agent) as session:
            # Code that is refused is a lost round: asked again, a small model repeats itself.
            with suppress(ToolRetriesExceeded):
                await session.step(
                    prompt,
                    tool_choice="rewrite_function",
                    args={"path": suspect.path, "code": code},
                    settings=sampling,
                )
                await session.step(tool_choice="run_tests")

    async def _think(self, suspect: _Suspect, text: str, sampling: ModelSettings) -> str:
        """Has the model explain the bug and write the function after that; returns the function.

        Free text, with the wrong code in view: the explanation is what keeps a small model from
        copying it.
        """
        failures = "\n".join(failure.details for failure in self.report.failures[:1])
        async with self._session(self._thinker) as session:
            step = await session.step(
                f"{self._instruction}\n\n{suspect.path}:\n```python\n{text.strip()}\n```\n\n"
                f"Failing tests:\n{failures}\n\n"
                "Write the corrected function in a ```python block. "
                "Change what is wrong; do not repeat the bug.",
                settings=sampling,
            )
        block = re.search(r"```(?:python)?\n(.*?)(```|$)", step.text, re.DOTALL)
        return block[1] if block else ""

    def _anew(self, suspect: _Suspect, contract: str) -> str:
        """The task of writing a function from what it promises and its tests, not its body."""
        defaults = "Choose the default values marked ?. " if "?" in contract else ""
        return (
            f"Write the Python function\n```python\n{contract}\n```\n"
            f"so that these tests pass:\n```python\n{self._test_source(suspect)}\n```\n"
            f"{defaults}Write only the function."
        )

    def _test_source(self, suspect: _Suspect) -> str:
        """The test files that mention the function, cut where they get long."""
        texts = [self._workspace.read_text(path) for path in _test_files(self.report)]
        return "\n".join(text for text in texts if suspect.name in text)[:MAX_TESTS_CHARS].strip()

    @asynccontextmanager
    async def _session(self, agent: Agent[object, str]) -> AsyncIterator[Session[object, str]]:
        """A conversation whose events and steps are numbered on from those before."""
        done = len(self.steps)

        async def forward(event: AgentEvent) -> None:
            if self._on_event is not None:
                answer = self._on_event(replace(event, step=done + event.step))
                if answer is not None:
                    await answer

        async with agent.session(on_event=forward) as session:
            try:
                yield session
            finally:
                self.steps.extend(session.steps)


def _badness(report: Report) -> float:
    """Fewer is better; a run without a result is worst."""
    return float("inf") if report.problem is not None else len(report.failures)


def _test_files(report: Report) -> list[str]:
    return list(dict.fromkeys(failure.test.partition("::")[0] for failure in report.failures))


def _modules(workspace: Workspace, report: Report) -> list[str]:
    """Modules with functions that the failing tests name, by the frames or by their imports."""
    found: dict[str, str] = {}
    for entry in workspace.files():
        name = entry.name.rpartition("/")[2]
        if name.endswith(".py") and not re.match(r"test_|conftest\.py|.*_test\.py", name):
            found[entry.name] = name.removesuffix(".py")
    found = {
        path: stem for path, stem in found.items() if function_names(workspace.read_text(path))
    }
    talk = "\n".join(failure.details for failure in report.failures)
    named = [path for path in found if f"{path}:" in talk]
    sources = "\n".join(
        workspace.read_text(path) for path in _test_files(report) if path.endswith(".py")
    )
    imported = [path for path, stem in found.items() if re.search(rf"\b{stem}\b", sources)]
    return named or imported or list(found)


def _suspects(text: str, report: Report) -> list[str]:
    """The functions of a module that the failures name; all of them when none is named."""
    talk = "\n".join(failure.details for failure in report.failures)
    names = function_names(text)
    return [name for name in names if re.search(rf"\b{name}\b", talk)] or list(names)
