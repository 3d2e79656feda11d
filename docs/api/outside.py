"""Links that lead out of docs/ (to tests, to the README) as plain text."""

from __future__ import annotations

import re
from typing import Any

LINK = re.compile(r"\[([^\]]+)\]\(\.\./[^)]+\)")


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Called by mkdocs with each page before it is rendered."""
    return LINK.sub(r"\1", markdown)
