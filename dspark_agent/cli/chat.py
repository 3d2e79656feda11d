"""``dspark-agent chat``: a conversation whose every turn re-uses the turns before it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dspark_agent.cli.console import err
from dspark_agent.cli.model_options import (
    DEFAULT_MODEL,
    BaseUrlOption,
    ModelOption,
    PrecisionOption,
    ThreadsOption,
    open_model,
)
from dspark_agent.cli.tool_options import (
    ToolOption,
    WorkspaceOption,
    chosen_toolsets,
    harmless_tools,
)

_INSTRUCTIONS = "You are a helpful assistant. Answer briefly."


def chat(
    model: ModelOption = DEFAULT_MODEL,
    instructions: Annotated[
        str, typer.Option("--instructions", "-i", help="What the model should be.")
    ] = _INSTRUCTIONS,
    workspace: WorkspaceOption = None,
    tool: ToolOption = None,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Run tools that change things without asking.")
    ] = False,
    history: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="Go on from a chat that /save wrote."),
    ] = None,
    max_steps: Annotated[int, typer.Option(min=1, help="Most turns of an answer.")] = 12,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a turn.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Keys the noise of sampling.")] = 0,
    precision: PrecisionOption = None,
    threads: ThreadsOption = None,
    base_url: BaseUrlOption = None,
) -> None:
    """Talk to a model, with tools if you like. Ctrl-C stops an answer, twice leaves."""
    from anyio.from_thread import start_blocking_portal

    from dspark_agent import Agent, DeferredToolRequests, ModelSettings, UsageLimits
    from dspark_agent.cli.chat_commands import read_history
    from dspark_agent.cli.chat_loop import Chat, Desk

    toolsets = chosen_toolsets(workspace, tool)
    start = None if history is None else read_history(history)
    names = [name for toolset in toolsets for name in toolset.tools]
    desk = Desk(names if workspace is None or yes else harmless_tools(workspace))
    agent = Agent(
        open_model(model, precision=precision, threads=threads, base_url=base_url),
        output_type=str | DeferredToolRequests,
        instructions=instructions,
        toolsets=[
            toolset.approval_required(lambda ctx, args: desk.asks(ctx.tool_name))
            for toolset in toolsets
        ],
        model_settings=ModelSettings(max_tokens=max_tokens, temperature=temperature, seed=seed),
        limits=UsageLimits(request_limit=None),
    )
    err().print("[note]/help names the commands; Ctrl-D leaves[/]")
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(agent):
        limits = UsageLimits(request_limit=max_steps)
        Chat(agent, portal, desk, answer_limits=limits).talk(start)
