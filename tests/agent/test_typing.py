"""What a type checker says about user code: deps and outputs flow, mistakes are found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
from dataclasses import dataclass

from enum import Enum
from typing import TypedDict

from dspark_agent import (
    Agent, DeferredToolRequests, DeferredToolResults, FunctionToolset, Hooks, Journal, JsonSchema,
    ModelTurn, NativeOutput, PromptedOutput, RunContext, SqliteJournal, StepResult, TestModel,
    TextOutput, ToolOutput, UsageLimits, tool,
)
from pydantic import BaseModel


@dataclass
class Deps:
    root: str


class Plan(BaseModel):
    title: str


@tool
def free(n: int) -> int:
    "Free."
    return n


plain = Agent(TestModel(), tools=[free], toolsets=[FunctionToolset([free])])
reveal_type(plain)
typed = Agent(TestModel(), output_type=Plan, deps_type=Deps)
reveal_type(typed)
reveal_type(Agent(TestModel(), output_type=JsonSchema({}), deps_type=Deps))
either = Agent(TestModel(), output_type=Plan | str)
pausing = Agent(TestModel(), output_type=Plan | DeferredToolRequests)
journal: Journal = SqliteJournal("runs.sqlite")


@typed.tool
def read(ctx: RunContext[Deps], path: str) -> str:
    return ctx.deps.root + path


@typed.tool(timeout=3)
async def write(ctx: RunContext[Deps], path: str, text: str) -> int:
    return len(text)


@typed.tool_plain
def add(a: int, b: int) -> int:
    return a + b


reveal_type(read)
reveal_type(add)


async def main() -> None:
    result = await typed.run("Go", deps=Deps("/"), limits=UsageLimits(request_limit=3))
    reveal_type(result.output)
    reveal_type(result.steps)
    reveal_type((await typed.run("Go", output_type=int)).output)
    reveal_type(plain.run_sync("Go").output)
    async with typed.session(deps=Deps("/")) as session:
        reveal_type(await session.step("Go"))
        reveal_type((await session.step("Go", output_type=list[int])).output)
        reveal_type((await session.step("Go", output_type=JsonSchema({}))).output)
        reveal_type(await session.run("Go"))
    async with typed.iter("Go", deps=Deps("/")) as run:
        async for step in run:
            reveal_type(step)
        reveal_type(run.result.output)
    async with typed.run_stream("Go", deps=Deps("/")) as stream:
        reveal_type((await stream.result()).output)
    reveal_type((await either.run("Go")).output)
    decided = DeferredToolResults(approvals={"call": True})
    reveal_type((await pausing.run("Go", journal=journal, run_id="r")).output)
    reveal_type((await typed.resume("r", journal=journal, deps=Deps("/"))).output)
    reveal_type((await typed.resume("r", journal=journal, output_type=int)).output)
    async with pausing.session() as session2:
        reveal_type((await session2.step(deferred_tool_results=decided)).output)
    reveal_type((await plain.run("Go", output_type=ToolOutput(Plan))).output)
    async with plain.session() as session:
        reveal_type((await session.step("Go", output_type=PromptedOutput(list[int]))).output)
        reveal_type((await session.run("Go", output_type=NativeOutput(Plan | Deps))).output)


class Size(Enum):
    S = "s"


class Film(TypedDict):
    title: str


def words(text: str) -> list[str]:
    return text.split()


async def book(ctx: RunContext[Deps], seat: int) -> Plan:
    return Plan(title=ctx.deps.root)


class Audit(Hooks[Deps]):
    async def before_model(self, ctx: RunContext[Deps], turn: ModelTurn) -> ModelTurn | None:
        reveal_type(ctx.deps)
        return None


model = TestModel()
reveal_type(Agent(model, output_type=Size))
reveal_type(Agent(model, output_type=Film))
reveal_type(Agent(model, output_type=words))
reveal_type(Agent(model, output_type=book, deps_type=Deps))
reveal_type(Agent(model, output_type=TextOutput(words)))
reveal_type(Agent(model, output_type=ToolOutput(book, name="reserve"), deps_type=Deps))
reveal_type(Agent(model, output_type=ToolOutput(Plan) | ToolOutput(Film, name="film")))
reveal_type(Agent(model, output_type=ToolOutput(Plan) | words | TextOutput(len)))
reveal_type(Agent(model, output_type=ToolOutput(Plan) | str))
reveal_type(Agent(model, output_type=[Plan, Size]))
reveal_type(Agent(model, deps_type=Deps, hooks=[Audit()]))


async def mistakes() -> None:
    await typed.run("Go", deps="not deps")  # E: deps
    await typed.run("Go", dpes=Deps("/"))  # E: dpes
    await typed.resume("r")  # E: journal
    await typed.resume("r", journal=journal, message_history=[])  # E: history

    @typed.tool  # E: ctx
    def wrong(ctx: RunContext[int], path: str) -> str:
        return path

    read(1, "a")  # E: read
    step: StepResult[int] = await typed.session(deps=Deps("/")).step("Go")  # E: step
    Agent(model, output_type=3)  # E: int
    Agent(model, outputs=Plan)  # E: outputs
    Agent(model, deps_type=int, hooks=[Audit()])  # E: Audit
    ToolOutput(Plan, nmae="plan")  # E: nmae
    film: Plan = (await Agent(model, output_type=ToolOutput(Film)).run("Go")).output  # E: Film
"""

REVEALED = [
    "Agent[object, str]",
    "Agent[Deps, Plan]",
    "Agent[Deps, Any]",
    "def (RunContext[Deps], path: str) -> str",
    "def (a: int, b: int) -> int",
    "Plan",
    "tuple[StepResult[Any], ...]",
    "int",
    "str",
    "StepResult[Plan]",
    "list[int]",
    "Any",
    "RunResult[Plan]",
    "StepResult[Plan]",
    "Plan",
    "Plan",
    "Plan | str",
    "Plan | DeferredToolRequests",
    "Plan",
    "int",
    "Plan | DeferredToolRequests",
    "Plan",
    "list[int]",
    "Plan | Deps",
    "Deps",
    "Agent[object, Size]",
    "Agent[object, TypedDict(Film, {'title': str})]",
    "Agent[object, list[str]]",
    "Agent[Deps, Plan]",
    "Agent[object, list[str]]",
    "Agent[Deps, Plan]",
    "Agent[object, Plan | TypedDict(Film, {'title': str})]",
    "Agent[object, Plan | list[str] | int]",
    "Agent[object, Plan | str]",
    "Agent[object, Any]",
    "Agent[Deps, str]",
]


SETTINGS = """
[mypy]
# What the project's own code says when it is checked by itself is another test's business.
follow_imports = silent

# The engine and torch take most of a minute to check and are no part of the claim.
[mypy-dspark_backend.*,torch.*]
follow_imports = skip
"""


@pytest.fixture(scope="module")
def findings(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("typing")
    cache = pytestconfig.cache
    assert cache is not None
    (folder / "program.py").write_text(PROGRAM)
    (folder / "mypy.ini").write_text(SETTINGS)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--hide-error-context",
         "--cache-dir", str(cache.mkdir("mypy")), "program.py"],
        cwd=folder, env={"MYPYPATH": _project_path(), "PATH": ""}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.stderr == ""
    return done.stdout.splitlines()


def _project_path() -> str:
    root = Path(__file__).parents[2]
    return ":".join(str(root / part) for part in ("", "backend", "tools"))


def test_types_flow_from_declaration_to_result(findings: list[str]) -> None:
    revealed = [line.split('Revealed type is "')[1][:-1] for line in findings if "Revealed" in line]
    for module in ("program.", "builtins.", "dspark_agent.agent.", "dspark_agent.step.",
                   "dspark_agent.run.", "dspark_agent.context.",
                   "dspark_agent.deferred."):  # fmt: skip
        revealed = [text.replace(module, "") for text in revealed]
    assert revealed == REVEALED


def test_mistakes_are_found_where_they_are_and_nothing_else(findings: list[str]) -> None:
    lines = PROGRAM.splitlines()
    expected = {number for number, line in enumerate(lines, 1) if "# E: " in line}
    errors = [line for line in findings if ": error: " in line]
    assert {int(line.split(":")[1]) for line in errors} == expected, "\n".join(errors)
