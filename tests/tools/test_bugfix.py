"""The bug-fix recipe: what its steps are, what the model gets to see, and what stays changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dspark_agent import AgentEvent, FunctionModel, ModelTurn, StepEnd, StepStart, ToolCallPart
from dspark_agent.models.testing import Messages
from dspark_tools.bugfix import BugFix, fix_bug
from dspark_tools.tasks import load_task, materialise
from dspark_tools.tests import Pytest
from dspark_tools.workspace import Workspace

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.parametrize("anyio_backend", ["asyncio"]),  # each run starts pytest processes
]

RIGHT = "def average(values):\n    return sum(values) / len(values)"
WRONG = "def average(values):\n    return max(values)"
BROKEN = "def average(values):\n    return ]"


class Writer:
    """A model that calls what it is told to, and takes its code from a list."""

    def __init__(self, *codes: str) -> None:
        self.codes = list(codes)
        self.seen: list[str] = []

    def __call__(self, messages: Messages, turn: ModelTurn) -> ToolCallPart | str:
        said = "\n".join(
            str(part.content) for part in messages[-1].parts if hasattr(part, "content")
        )
        if turn.output_schema is not None:
            return '{"result": "spread"}'
        if not turn.tools or turn.tool_choice == "none":
            self.seen.append(said)
            return f"The bug is there.\n```python\n{self.codes.pop(0)}\n```"
        if turn.tool_choice == "run_tests":
            return ToolCallPart(tool_name="run_tests", args={})
        properties = next(t for t in turn.tools if t.name == turn.tool_choice).parameters[
            "properties"
        ]
        args = {name: schema["const"] for name, schema in properties.items() if "const" in schema}
        if turn.tool_choice == "read_file":
            args["path"] = properties["path"]["enum"][0]
        elif "code" not in args:
            self.seen.append(said)
            args["code"] = self.codes.pop(0)
        return ToolCallPart(tool_name=turn.tool_choice, args=args)


async def fix(
    workspace: Workspace,
    *codes: str,
    rounds: int = 4,
    on_event: Callable[[AgentEvent], None] | None = None,
) -> tuple[BugFix, Writer]:
    writer = Writer(*codes)
    result = await fix_bug(
        FunctionModel(writer),
        workspace,
        "The average is wrong.",
        rounds=rounds,
        tests=Pytest(workspace, plugins=False),
        on_event=on_event,
    )
    return result, writer


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return materialise(load_task("average"), tmp_path)


def called(result: BugFix) -> list[str]:
    return [step.tool_calls[0].tool_name if step.tool_calls else "text" for step in result.steps]


async def test_right_code_ends_the_first_round(workspace: Workspace) -> None:
    result, _ = await fix(workspace, RIGHT)

    assert (result.fixed, result.rounds, result.report.passed) == (True, 1, 3)
    assert called(result) == ["run_tests", "read_file", "rewrite_function", "run_tests"]
    assert "sum(values) / len(values)" in workspace.read_text("stats.py")


async def test_writer_sees_promise_and_tests_but_not_the_wrong_body(workspace: Workspace) -> None:
    _, writer = await fix(workspace, RIGHT)

    (prompt,) = writer.seen
    assert "The arithmetic mean of the values." in prompt
    assert "assert average([1, 2]) == 1.5" in prompt
    assert "//" not in prompt


async def test_second_round_thinks_with_the_code_in_view(workspace: Workspace) -> None:
    result, writer = await fix(workspace, WRONG, RIGHT)

    assert (result.fixed, result.rounds) == (True, 2)
    assert called(result)[4:] == ["text", "rewrite_function", "run_tests"]
    assert "return sum(values) // len(values)" in writer.seen[1]
    assert "The average is wrong." in writer.seen[1]


async def test_code_that_does_not_parse_is_a_lost_round(workspace: Workspace) -> None:
    result, _ = await fix(workspace, BROKEN, BROKEN, RIGHT)

    assert (result.fixed, result.rounds) == (True, 3)


async def test_changes_that_do_not_help_are_taken_back(workspace: Workspace) -> None:
    before = workspace.read_text("stats.py")

    result, _ = await fix(workspace, WRONG, WRONG, BROKEN, rounds=3)

    assert (result.fixed, result.rounds) == (False, 3)
    assert [failure.test for failure in result.report.failures] == [
        "test_stats.py::test_average_with_fraction"
    ]
    assert workspace.read_text("stats.py") == before


async def test_two_bugs_are_fixed_one_after_the_other(workspace: Workspace) -> None:
    text = workspace.read_text("stats.py")
    workspace.write_text("stats.py", text.replace("max(values) - min(values)", "max(values)"))

    # The writer names "spread" first when asked which of the two functions is wrong.
    result, _ = await fix(
        workspace, "def spread(values):\n    return max(values) - min(values)", RIGHT
    )

    assert (result.fixed, result.rounds) == (True, 2)
    assert result.report.passed == 3


async def test_next_suspect_has_its_turn_when_two_rounds_did_not_help(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    workspace.write_text(
        "calc.py", "def spread(x):\n    return x\n\n\ndef average(x):\n    return sum(x)\n"
    )
    workspace.write_text(
        "test_calc.py",
        "from calc import average, spread\n\n\ndef test_it():\n"
        "    assert average(spread([2, 4])) == 3\n",
    )
    innocent = "def spread(x):\n    return list(x)"

    result, _ = await fix(
        workspace, innocent, innocent, "def average(values):\n    return sum(values) / len(values)"
    )

    assert (result.fixed, result.rounds) == (True, 3)


async def test_nothing_is_written_where_all_tests_pass(workspace: Workspace) -> None:
    text = workspace.read_text("stats.py").replace("//", "/")
    workspace.write_text("stats.py", text)

    result, _ = await fix(workspace)

    assert (result.fixed, result.rounds, called(result)) == (True, 0, ["run_tests"])


async def test_project_without_functions_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text("def test_one():\n    assert 0\n")

    result, _ = await fix(Workspace(tmp_path))

    assert (result.fixed, result.rounds) == (False, 0)


async def test_events_number_the_steps_through(workspace: Workspace) -> None:
    events: list[AgentEvent] = []

    result, _ = await fix(workspace, WRONG, RIGHT, on_event=events.append)

    started = [event.step for event in events if isinstance(event, StepStart)]
    ended = [event.step for event in events if isinstance(event, StepEnd)]
    assert started == ended == list(range(len(result.steps)))
