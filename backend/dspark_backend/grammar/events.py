"""What a streaming parser reports while a turn is being written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More of the turn's text."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """The model has chosen a tool. ``index`` counts the turn's calls from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArgsDelta:
    """More of the JSON text of a call's arguments."""

    index: int
    json_fragment: str


@dataclass(frozen=True, slots=True)
class ToolCallEnd:
    """A call is complete."""

    index: int
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ObjectDelta:
    """More of the JSON text of the typed result."""

    json_fragment: str


TurnEvent: TypeAlias = TextDelta | ToolCallStart | ToolCallArgsDelta | ToolCallEnd | ObjectDelta
