"""``dspark-agent models``: what is there, fetching more, and making room."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.filesize import decimal
from rich.table import Table

from dspark_agent.cli.console import err, out
from dspark_agent.cli.progress import model_bars

app = typer.Typer(help="List, fetch and delete models.", no_args_is_help=True)

ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A known name (see `models list`), a local folder or .gguf file, or a hub id.",
    ),
]


@app.command("list")
def list_() -> None:
    """Show the known models and those in the cache."""
    from dspark_backend.catalog import home, list_models

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("name")
    table.add_column("on disk", justify="right")
    table.add_column("download", justify="right")
    table.add_column("licence")
    table.add_column("description")
    for status in list_models():
        known = status.known
        table.add_row(
            status.name,
            decimal(status.size_bytes) if status.present else "-",
            decimal(known.size_bytes) if known else "",
            known.licence if known else "",
            known.description if known else "from a path or the hub",
        )
    out().print(table)
    err().print(f"[note]cache: {home()}[/]")


@app.command("pull")
def pull(model: ModelName) -> None:
    """Fetch a model and make it ready to load."""
    from dspark_backend.catalog import resolve

    with model_bars() as bars:
        files = resolve(model, progress=bars)
    out().print(f"{files.name} is ready")
    err().print(f"[note]{files.folder}[/]")


@app.command("rm")
def rm(model: ModelName) -> None:
    """Delete what the cache holds of a model; your own files stay."""
    from dspark_backend.catalog import remove

    out().print(f"{model}: freed {decimal(remove(model))}")
