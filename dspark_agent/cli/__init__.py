"""The command line: ``dspark-agent demo | chat | run | models | bench``."""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; ``None`` takes the process's arguments."""
    from dspark_agent.cli.app import run_app

    return run_app(arguments)


__all__ = ["main"]
