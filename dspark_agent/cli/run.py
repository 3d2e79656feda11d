"""``dspark-agent run``: one task for an agent, from a prompt to an answer."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dspark_agent.cli.boundary import UsageError
from dspark_agent.cli.console import err, out, plain
from dspark_agent.cli.model_options import (
    DEFAULT_MODEL,
    BaseUrlOption,
    ModelOption,
    PrecisionOption,
    ThreadsOption,
    open_model,
)

if TYPE_CHECKING:
    from dspark_agent import FunctionToolset

_INSTRUCTIONS = "You are a helpful assistant. Answer briefly."
_WITH_TOOLS = (
    "You work on a project through your tools. Look at what you need, do what is asked, and then "
    "answer briefly."
)


class ToolGroup(StrEnum):
    """What a run may do in its workspace."""

    READ = "read"
    EDIT = "edit"
    TESTS = "tests"
    PYTHON = "python"
    SHELL = "shell"
    GIT = "git"


def run(
    prompt: Annotated[str, typer.Argument(help="What to do; `-` reads it from standard input.")],
    model: ModelOption = DEFAULT_MODEL,
    workspace: Annotated[
        Path | None,
        typer.Option(
            "--workspace", "-w", exists=True, file_okay=False, help="Folder for the tools."
        ),
    ] = None,
    tool: Annotated[
        list[ToolGroup] | None,
        typer.Option("--tool", "-t", help="Tools to offer; may be repeated. [default: read]"),
    ] = None,
    schema: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="JSON Schema that the answer must satisfy."),
    ] = None,
    instructions: Annotated[
        str | None, typer.Option("--instructions", "-i", help="What the model should be.")
    ] = None,
    max_steps: Annotated[int, typer.Option(min=1, help="Most turns of the model.")] = 12,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a turn.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Keys the noise of sampling.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only the answer.")] = False,
    precision: PrecisionOption = None,
    threads: ThreadsOption = None,
    base_url: BaseUrlOption = None,
) -> None:
    """Give an agent one task. Steps go to stderr, the answer to stdout."""
    if tool and workspace is None:
        raise UsageError("--tool needs --workspace: the folder that the tools may touch")
    from dspark_agent import Agent, JsonSchema, ModelSettings, UsageLimits
    from dspark_agent.cli.latency import latency_table
    from dspark_agent.cli.steps_view import StepsView

    task = sys.stdin.read() if prompt == "-" else prompt
    if not task.strip():
        raise UsageError("the prompt is empty")
    output: Any = str if schema is None else JsonSchema(_schema(schema))
    toolsets = [] if workspace is None else _toolsets(workspace, tool or [ToolGroup.READ])
    agent: Agent[None, Any] = Agent(
        open_model(model, precision=precision, threads=threads, base_url=base_url),
        output_type=output,
        instructions=instructions or (_WITH_TOOLS if toolsets else _INSTRUCTIONS),
        toolsets=toolsets,
        model_settings=ModelSettings(max_tokens=max_tokens, temperature=temperature, seed=seed),
        limits=UsageLimits(request_limit=max_steps),
    )
    result = agent.run_sync(task, on_event=None if quiet else StepsView(err()))
    if not quiet:
        err().print(latency_table(result.steps))
    answer = result.output if schema is None else json.dumps(result.output, ensure_ascii=False)
    out().print(plain(answer), soft_wrap=True)


def _schema(path: Path) -> dict[str, Any]:
    try:
        schema = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UsageError(f"{path} is not JSON: {error}") from error
    if not isinstance(schema, dict):
        raise UsageError(f"{path} must hold a JSON Schema object")
    return schema


def _toolsets(folder: Path, groups: list[ToolGroup]) -> list[FunctionToolset]:
    """The toolsets of ``groups``, each once, in the workspace ``folder``."""
    from dspark_tools import Files, Git, Pytest, Python, Search, Shell, Workspace

    workspace = Workspace(folder)
    made: list[FunctionToolset] = []
    if ToolGroup.EDIT in groups:
        made.append(Files(workspace).toolset())
    elif ToolGroup.READ in groups:
        made.append(Files(workspace).reading_toolset())
    if ToolGroup.READ in groups or ToolGroup.EDIT in groups:
        made.append(Search(workspace).toolset())
    if ToolGroup.TESTS in groups:
        made.append(Pytest(workspace).toolset())
    if ToolGroup.PYTHON in groups:
        made.append(Python(workspace).toolset())
    if ToolGroup.SHELL in groups:
        made.append(Shell(workspace).toolset())
    if ToolGroup.GIT in groups:
        made.append(Git(workspace).toolset())
    return made
