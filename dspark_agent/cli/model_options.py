"""The options that name a model, and opening it with bars rather than silence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from dspark_agent.cli.boundary import UsageError
from dspark_agent.cli.console import err
from dspark_agent.cli.progress import model_bars

if TYPE_CHECKING:
    from dspark_agent.models.base import Model

DEFAULT_MODEL = "qwen2.5-coder-0.5b"

ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="Known name (see `models list`), path, hub id, or openai:NAME for a server.",
    ),
]
PrecisionOption = Annotated[
    str | None,
    typer.Option(
        "--precision", help="bf16, fp32, int8 or int8x16; the measured best when left out."
    ),
]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", min=1, help="Threads of the engine.")
]
BaseUrlOption = Annotated[
    str | None, typer.Option("--base-url", help="Address of the server of an openai: model.")
]


def open_model(
    name: str,
    *,
    precision: str | None = None,
    threads: int | None = None,
    base_url: str | None = None,
) -> Model:
    """The model behind ``name``: fetched, converted and loaded, so that a first step is quick.

    Raises:
        UsageError: options that do not go together.
        ModelError: the model cannot be found, fetched or read.
    """
    if name.startswith("openai:"):
        if precision is not None or threads is not None:
            raise UsageError("--precision and --threads are for models that run here")
        from dspark_agent import infer_model

        return infer_model(name, base_url=base_url)
    if base_url is not None:
        raise UsageError("--base-url is for openai: models")
    import anyio

    from dspark_agent import DSparkModel

    note = f"loading {name} (a machine's first load compiles the kernels, a dozen seconds)"
    with err().status(note), model_bars() as bars:
        opened = DSparkModel(name, precision=precision, threads=threads, progress=bars)
        engine = anyio.run(opened.load)
    err().print(f"[note]{engine.name}, {engine.precision}[/]")
    return opened
