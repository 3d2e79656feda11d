"""Options that several of the ``bench`` commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Option("--model", "-m", help="Known name, path or hub id.")]
Precision = Annotated[
    str | None,
    typer.Option(help="bf16, fp32, int8 or int8x16; the model's measured best when left out."),
]
Device = Annotated[
    str | None, typer.Option(help="cuda or cuda:N for a GPU, of all contenders; else the CPU.")
]
Drafter = Annotated[
    Path | None,
    typer.Option(
        exists=True, file_okay=False, help="Drafter's folder; the one that ships when left out."
    ),
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="For all contenders; all usable cores when left out.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first K lines of the file.")]
Json = Annotated[Path, typer.Option("--json", help="Where the report goes.")]
Traces = Annotated[
    list[str] | None,
    typer.Option(
        "--trace",
        help="JSON-lines file of recorded runs, or the name of one that ships; may be repeated. "
        "All that ship when left out.",
    ),
]
