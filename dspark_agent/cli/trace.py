"""``dspark-agent trace``: a recorded run as one page to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dspark_agent.cli.boundary import UsageError
from dspark_agent.cli.console import err, out, plain


def trace(
    file: Annotated[
        Path,
        typer.Argument(dir_okay=False, help="Written by `run --trace` or Timeline.write."),
    ],
    html: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The page; FILE with .html at the end when left out."),
    ] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
) -> None:
    """Draw a recorded run: when each step of each agent did what, as one HTML file."""
    from dspark_agent.timeline import Timeline

    page = html or file.with_suffix(".html")
    if page == file:
        raise UsageError(f"{file} would be overwritten: name the page with --out")
    timeline = Timeline.read(file)
    page.write_text(timeline.html(), encoding="utf-8")
    out().print(str(page), soft_wrap=True, markup=False)
    agents = ", ".join(dict.fromkeys(agent for agent, _ in timeline.lanes))
    err().print(
        plain(f"steps: {len(timeline.steps)}, {timeline.total_s:.2f} s, by {agents}", "dim"),
        soft_wrap=True,
    )
    if open_page:
        typer.launch(page.resolve().as_uri())
