"""A turn read as it is written: the model's events, and the parts they add up to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

from dspark_agent.messages import ResponsePart
from dspark_agent.models.base import ModelEvent, TextChunk
from dspark_agent.models.builder import ResponseBuilder

E_co = TypeVar("E_co", covariant=True)
E = TypeVar("E")


class Parser(Protocol[E_co]):
    """Makes events of text; what it cannot be sure of it keeps until more comes."""

    def feed(self, text: str) -> Sequence[E_co]: ...

    def flush(self) -> Sequence[E_co]: ...


class TurnReader(Generic[E]):
    """Reads a turn's text through ``parser`` (None: all of it is text); ``translate`` makes the
    SDK's events of the parser's."""

    def __init__(self, parser: Parser[E] | None, translate: Callable[[E], ModelEvent]) -> None:
        self._parser = parser
        self._translate = translate
        self._builder = ResponseBuilder()

    def feed(self, text: str) -> list[ModelEvent]:
        """The events that ``text`` makes certain."""
        if self._parser is not None:
            return self._taken([self._translate(event) for event in self._parser.feed(text)])
        return self._taken([TextChunk(text)] if text else [])

    def end(self) -> list[ModelEvent]:
        """The events that were waiting for more text, which does not come."""
        waiting = [] if self._parser is None else self._parser.flush()
        return self._taken([self._translate(event) for event in waiting])

    def parts(self) -> tuple[ResponsePart, ...]:
        """What the turn came to."""
        return self._builder.parts()

    def _taken(self, events: list[ModelEvent]) -> list[ModelEvent]:
        for event in events:
            self._builder.add(event)
        return events
