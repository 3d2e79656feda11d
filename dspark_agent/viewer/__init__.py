"""A timeline as one HTML page that needs nothing else: no network, no server, no other file."""

from __future__ import annotations

from importlib import resources
from string import Template
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dspark_agent.timeline import Timeline


def page(timeline: Timeline) -> str:
    """The page. What a model or a tool said is data in it, never markup or script."""
    data = timeline.model_dump_json()
    return Template(_asset("page.html")).substitute(
        style=_asset("page.css"),
        script="".join(_asset(name) for name in ("layout.js", "draw.js", "events.js")),
        # JSON in a script element: only "<" could end it early.
        data=data.replace("<", "\\u003c"),
    )


def _asset(name: str) -> str:
    return resources.files(__name__).joinpath(name).read_text("utf-8")


__all__ = ["page"]
