"""``dspark-agent run``: one task for an agent, from a prompt to an answer."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from dspark_agent.cli.boundary import UsageError
from dspark_agent.cli.console import check_writable, err, out, plain
from dspark_agent.cli.model_options import (
    DEFAULT_MODEL,
    BaseUrlOption,
    ModelOption,
    PrecisionOption,
    ThreadsOption,
    open_model,
)
from dspark_agent.cli.tool_options import ToolOption, WorkspaceOption, chosen_toolsets

_INSTRUCTIONS = "You are a helpful assistant. Answer briefly."
_WITH_TOOLS = (
    "You work on a project through your tools. Look at what you need, do what is asked, and then "
    "answer briefly."
)


def run(
    prompt: Annotated[str, typer.Argument(help="What to do; `-` reads it from standard input.")],
    model: ModelOption = DEFAULT_MODEL,
    workspace: WorkspaceOption = None,
    tool: ToolOption = None,
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
    trace: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="Record the run there, for `dspark-agent trace`."),
    ] = None,
    trace_content: Annotated[
        bool, typer.Option(help="With what was said, called and returned in it.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only the answer.")] = False,
    precision: PrecisionOption = None,
    threads: ThreadsOption = None,
    base_url: BaseUrlOption = None,
) -> None:
    """Give an agent one task. Steps go to stderr, the answer to stdout."""
    toolsets = chosen_toolsets(workspace, tool)
    if trace_content and trace is None:
        raise UsageError("--trace-content needs --trace: the file to record the run in")
    from dspark_agent import Agent, JsonSchema, ModelSettings, UsageLimits
    from dspark_agent.cli.latency import latency_table
    from dspark_agent.cli.steps_view import StepsView

    task = sys.stdin.read() if prompt == "-" else prompt
    if not task.strip():
        raise UsageError("the prompt is empty")
    output: Any = str if schema is None else JsonSchema(_schema(schema))
    agent: Agent[None, Any] = Agent(
        open_model(model, precision=precision, threads=threads, base_url=base_url),
        output_type=output,
        instructions=instructions or (_WITH_TOOLS if toolsets else _INSTRUCTIONS),
        toolsets=toolsets,
        model_settings=ModelSettings(max_tokens=max_tokens, temperature=temperature, seed=seed),
        limits=UsageLimits(request_limit=max_steps),
    )
    with _recorded(trace, content=trace_content):
        result = agent.run_sync(task, on_event=None if quiet else StepsView(err()))
    if not quiet:
        err().print(latency_table(result.steps))
    answer = result.output if schema is None else json.dumps(result.output, ensure_ascii=False)
    out().print(plain(answer), soft_wrap=True)


@contextmanager
def _recorded(path: Path | None, *, content: bool) -> Iterator[None]:
    """Writes what is run inside to ``path``, as far as it got; finds out first whether it can."""
    if path is None:
        yield
        return
    from dspark_agent import Recording

    check_writable(path)
    with Recording() as recording:
        try:
            yield
        finally:
            if recording.steps:
                recording.timeline(content=content).write(path)
                err().print(f"[note]wrote {path}[/]", soft_wrap=True)


def _schema(path: Path) -> dict[str, Any]:
    try:
        schema = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UsageError(f"{path} is not JSON: {error}") from error
    if not isinstance(schema, dict):
        raise UsageError(f"{path} must hold a JSON Schema object")
    return schema
