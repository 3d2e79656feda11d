"""Lines from the user: with editing, recall and completion where there is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress

_BOLD, _PLAIN = "\001\033[1;36m\002", "\001\033[0m\002"
"""Between \\001 and \\002 stands what takes no room on the screen."""


def read_line(prompt: str) -> str:
    """The next line, without its end.

    Raises:
        EOFError: there is none.
    """
    fancy = sys.stdin.isatty() and sys.stdout.isatty()
    return input(f"{_BOLD}{prompt}{_PLAIN}" if fancy else prompt)


def complete(words: Sequence[str]) -> None:
    """Have the tab key complete ``words``, where Python has readline."""
    with suppress(ImportError):
        import readline

        def completer(text: str, state: int) -> str | None:
            fitting = [word for word in words if word.startswith(text)]
            return fitting[state] if state < len(fitting) else None

        readline.set_completer(completer)
        readline.set_completer_delims(" ")
        readline.parse_and_bind("tab: complete")
