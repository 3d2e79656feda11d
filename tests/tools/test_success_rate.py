"""The success rate counts what the model fixes, and in which round."""

from __future__ import annotations

import pytest

from dspark_agent import FunctionModel, ModelTurn, ToolCallPart
from dspark_agent.models.testing import Messages
from dspark_tools.success_rate import Outcome, success_rate, table
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
async def test_outcomes_tell_the_round_of_the_fix() -> None:
    outcomes = await success_rate(FunctionModel(knows_averages), TASKS, rounds=1)

    assert outcomes == [Outcome("average", 1), Outcome("clamp", None)]


def test_table_has_a_column_for_each_model() -> None:
    shown = table(
        TASKS,
        {
            "small": [Outcome("average", 1), Outcome("clamp", None)],
            "large": [Outcome("average", 2), Outcome("clamp", 5)],
        },
    )

    assert shown.splitlines() == [
        "| task | bug | small | large |",
        "|---|---|---|---|",
        "| average | integer division | 1 | 2 |",
        "| clamp | swapped functions | - | 5 |",
        "| fixed in the first round | | 1 of 2 | 0 of 2 |",
        "| fixed in two rounds | | 1 of 2 | 1 of 2 |",
        "| fixed in the end | | 1 of 2 | 2 of 2 |",
    ]
