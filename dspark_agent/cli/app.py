"""The commands put together, and the options that come before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Annotated

import typer

from dspark_agent.cli import bench, chat, demo, models, run, trace, train
from dspark_agent.cli.boundary import guarded
from dspark_agent.cli.console import out
from dspark_agent.cli.eval import evaluate


@dataclass(slots=True)
class GlobalOptions:
    """What the options before the command set, for one call of :func:`run_app`."""

    debug: bool = False


def build_app(options: GlobalOptions) -> typer.Typer:
    """The typer application. Commands import the SDK and the engine when they run, not here."""
    app = typer.Typer(
        name="dspark-agent",
        help="Agents on a model that runs inside this process, and where each step's time goes.",
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def before(
        debug: Annotated[
            bool, typer.Option("--debug", help="Show the stack trace of an error.")
        ] = False,
        version: Annotated[
            bool,
            typer.Option(
                "--version", help="Print the version and exit.", is_eager=True, callback=_version
            ),
        ] = False,
    ) -> None:
        options.debug = debug

    app.command("demo")(demo.demo)
    app.command("chat")(chat.chat)
    app.command("run")(run.run)
    app.command("trace")(trace.trace)
    app.add_typer(models.app, name="models")
    app.add_typer(bench.app, name="bench")
    app.command("train")(train.train)
    app.command("eval")(evaluate)
    return app


def run_app(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    options = GlobalOptions()
    app = build_app(options)
    return guarded(lambda: app(args=arguments), debug=lambda: options.debug)


def _version(wanted: bool) -> None:
    if wanted:
        out().print(metadata.version("dspark-agent"))
        raise typer.Exit
