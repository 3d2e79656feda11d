"""Where the command line writes: results to stdout, everything about them to stderr."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from rich.console import Console
from rich.text import Text
from rich.theme import Theme

_THEME = Theme({"note": "dim", "good": "green", "bad": "bold red", "step": "bold cyan"})


@cache
def out() -> Console:
    """The console of results: what a pipe or a file should receive."""
    return Console(theme=_THEME, highlight=False)


@cache
def err() -> Console:
    """The console of notes, progress and errors."""
    return Console(theme=_THEME, highlight=False, stderr=True)


def check_writable(path: Path) -> None:
    """Raises OSError before the minutes of work, not after them; leaves nothing behind."""
    was_there = path.exists()
    with path.open("a", encoding="utf-8"):
        pass
    if not was_there:
        path.unlink()


def plain(text: str, style: str = "") -> Text:
    """Text from a model, a tool or a file as it may go to a terminal: no markup is read in it, and
    control characters that could move the cursor or recolour the screen are shown as symbols."""
    shown = "".join(char if char in "\n\t" or char.isprintable() else "\ufffd" for char in text)
    return Text(shown, style=style)
