"""``dspark-agent chat``: a conversation whose every turn re-uses the turns before it."""

from __future__ import annotations

from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dspark_agent.cli.console import err, out
from dspark_agent.cli.model_options import (
    DEFAULT_MODEL,
    BaseUrlOption,
    ModelOption,
    PrecisionOption,
    ThreadsOption,
    open_model,
)

if TYPE_CHECKING:
    from anyio.from_thread import BlockingPortal

    from dspark_agent import Agent, Session

_HELP = "/new starts over, /table shows where the time went, /exit (or Ctrl-D) leaves"


def chat(
    model: ModelOption = DEFAULT_MODEL,
    instructions: Annotated[
        str, typer.Option("--instructions", "-i", help="What the model should be.")
    ] = "You are a helpful assistant. Answer briefly.",
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Keys the noise of sampling.")] = 0,
    precision: PrecisionOption = None,
    threads: ThreadsOption = None,
    base_url: BaseUrlOption = None,
) -> None:
    """Talk to a model. Ctrl-C stops an answer, twice leaves."""
    from anyio.from_thread import start_blocking_portal

    from dspark_agent import Agent, ModelSettings, UsageLimits

    agent = Agent(
        open_model(model, precision=precision, threads=threads, base_url=base_url),
        instructions=instructions,
        model_settings=ModelSettings(max_tokens=max_tokens, temperature=temperature, seed=seed),
        limits=UsageLimits(request_limit=None),
    )
    err().print(f"[note]{_HELP}[/]")
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(agent):
        while _conversation(portal, agent):
            err().print("[note]a new conversation[/]")


def _conversation(portal: BlockingPortal, agent: Agent[Any, str]) -> bool:
    """One conversation; whether the user wants another."""
    from dspark_agent.cli.latency import latency_table
    from dspark_agent.cli.steps_view import StepsView

    view = StepsView(out(), headings=False)
    with portal.wrap_async_context_manager(agent.session(on_event=view)) as session:
        while True:
            try:
                said = out().input("[step]>[/] ").strip()
            except EOFError:
                out().print()
                return False
            if said == "/exit":
                return False
            if said == "/new":
                return True
            if said == "/table":
                out().print(latency_table(session.steps))
            elif said.startswith("/"):
                err().print(f"[note]{_HELP}[/]")
            elif said:
                _answer(portal, session, said)


def _answer(portal: BlockingPortal, session: Session[Any, Any], said: str) -> None:
    """One turn; Ctrl-C cancels it and leaves the conversation as it was before."""
    answer = portal.start_task_soon(session.step, said)
    try:
        answer.result()
    except (KeyboardInterrupt, CancelledError):
        answer.cancel()
        err().print("\n[note]stopped; the conversation is as it was before this question[/]")
