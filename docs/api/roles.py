"""The docstrings' roles (``:class:`Agent```) as plain code, which Markdown knows."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|meth|attr|data|func|mod):`~?([^`]+)`")


class Roles(griffe.Extension):
    """Rewrites every docstring as it is read."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = plain(obj.docstring.value)


def plain(text: str) -> str:
    """The text with roles as code, and literals (two backticks) left as they are."""
    return ROLE.sub(lambda match: f"`{match[1].rpartition('.')[2] or match[1]}`", text)
