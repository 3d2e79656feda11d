"""A turn's text to calls, result and text, piece by piece as it is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from dspark_backend.errors import GrammarError
from dspark_backend.grammar.callformat import FENCE_CLOSE, FENCE_OPEN, CallFormat, Unmarked
from dspark_backend.grammar.events import (
    ObjectDelta,
    TextDelta,
    ToolCallArgsDelta,
    ToolCallEnd,
    ToolCallStart,
    TurnEvent,
)
from dspark_backend.grammar.scanner import ObjectScanner
from dspark_backend.grammar.spec import ParsedCall, ParsedTurn, TurnSpec


class TurnParser:
    """Reads what the turn's grammar allows to be written, in pieces cut anywhere.

    Text is reported as soon as it is certain: what may still turn out to be a marker, and
    whitespace that may stand before one, waits.
    """

    def __init__(self, spec: TurnSpec, form: CallFormat, unmarked: Sequence[Unmarked] = ()) -> None:
        """``unmarked`` are the ways in which a call may be written without markers."""
        self._form = form
        self._may_write_text = spec.may_write_text  # until a fence is opened
        self._has_result = spec.result_schema is not None
        names = [function["name"] for function in spec.callable_tools]
        self._marked = {form.padding + form.head(name): name for name in names if form.open}
        self._unmarked = {way.head(name): (name, way.after) for way in unmarked for name in names}
        self._fence = FENCE_OPEN if self._has_result and self._may_write_text else ""
        self._fence_close = ""
        self._limit = spec.call_limit
        self._waiting = ""
        self._events: list[TurnEvent] = []
        self._read: Callable[[], bool] = self._beginning
        self._text: list[str] = []
        self._calls: list[ParsedCall] = []
        self._json: list[str] = []
        self._name = self._tail = self._again = ""
        self._scanner = ObjectScanner()

    def feed(self, text: str) -> list[TurnEvent]:
        """The events that ``text``, the next piece of the turn, makes certain.

        Raises:
            GrammarError: the turn is none that its grammar allows.
        """
        self._waiting += text
        while self._read():
            pass
        events, self._events = self._events, []
        return events

    def flush(self) -> list[TurnEvent]:
        """The text that waited for what did not come; call it when the turn is over."""
        if self._read == self._beginning and self._waiting:
            if self._may_write_text:
                self._read = self._free_text
            elif self._has_result:
                self._read = self._result
                self._result()
        if self._read == self._free_text and self._waiting:
            self._say(self._waiting)
            self._waiting = ""
        events, self._events = self._events, []
        return events

    def finish(self) -> ParsedTurn:
        """The whole turn.

        Raises:
            GrammarError: the turn broke off inside a tool call or a result.
        """
        self.flush()
        if self._read == self._beginning and not self._may_write_text and not self._waiting:
            raise GrammarError("the turn is empty, where a tool call or a result was demanded")
        if self._read == self._result and self._waiting == self._fence_close:
            return ParsedTurn(object=_value("".join(self._json)), has_object=True)
        if self._waiting or self._read not in (
            self._beginning,
            self._free_text,
            self._between_calls,
        ):
            inside = f"tool call {len(self._calls)} ({self._name or 'before its name'})"
            if self._read == self._result:
                inside = "a fenced result"
            raise GrammarError(f"the turn breaks off inside {inside}: give the step more tokens")
        return ParsedTurn(text="".join(self._text), tool_calls=tuple(self._calls))

    def _beginning(self) -> bool:
        if not self._waiting:
            return False
        for head, (name, tail) in self._unmarked.items():
            if self._take(head):
                self._begin_call(name, tail + self._fence_close, "")
                return True
        if self._marked and self._take(self._form.open):
            self._read = self._call_head
            return True
        if self._fence and self._take(self._fence):
            self._fence, self._fence_close = "", FENCE_CLOSE
            self._marked, self._may_write_text = {}, False
            return True
        openings = [*self._unmarked, self._form.open if self._marked else "", self._fence]
        if any(opening.startswith(self._waiting) for opening in openings):
            return False
        is_result = self._has_result and (not self._may_write_text or self._waiting[0] in "{[")
        if not is_result and not self._may_write_text:
            raise self._unexpected("a tool call")
        self._read = self._result if is_result else self._free_text
        return True

    def _free_text(self) -> bool:
        if not self._marked:
            self._say(self._waiting)
            self._waiting = ""
            return False
        said, marker, rest = self._waiting.partition(self._form.open)
        if marker:
            self._say(said.rstrip())
            self._waiting = rest
            self._read = self._call_head
            return True
        certain = self._waiting[: _possible_start(self._waiting, self._form.open)].rstrip()
        self._say(certain)
        self._waiting = self._waiting[len(certain) :]
        return False

    def _call_head(self) -> bool:
        if len(self._calls) == self._limit:
            raise GrammarError(f"more tool calls than the {self._limit} that the turn may hold")
        for head, name in self._marked.items():
            if self._take(head):
                tail = "}" + self._form.padding + self._form.close
                self._begin_call(name, tail, (self._form.separator or "") + self._form.open)
                return True
        if any(head.startswith(self._waiting) for head in self._marked):
            return False
        raise self._unexpected("a call of one of the tools " + ", ".join(self._marked.values()))

    def _begin_call(self, name: str, tail: str, again: str) -> None:
        """``tail`` is to follow the arguments, then the turn ends or ``again`` opens a call."""
        self._name, self._tail, self._again = name, tail, again
        self._events.append(ToolCallStart(len(self._calls), name))
        self._scanner = ObjectScanner()
        self._json = []
        self._read = self._arguments

    def _arguments(self) -> bool:
        length = self._scanner.feed(self._waiting)
        if length:
            fragment, self._waiting = self._waiting[:length], self._waiting[length:]
            self._json.append(fragment)
            self._events.append(ToolCallArgsDelta(len(self._calls), fragment))
        if not self._scanner.closed:
            return False
        self._read = self._call_tail
        return True

    def _call_tail(self) -> bool:
        if not self._take(self._tail):
            if self._tail.startswith(self._waiting):
                return False
            raise self._unexpected(f"{self._tail!r} after the arguments of {self._name}")
        arguments = _value("".join(self._json))
        self._events.append(ToolCallEnd(len(self._calls), self._name, arguments))
        self._calls.append(ParsedCall(self._name, arguments))
        self._name = ""
        self._read = self._between_calls
        return True

    def _between_calls(self) -> bool:
        if self._again and self._take(self._again):
            self._read = self._call_head
            return True
        if self._again.startswith(self._waiting):
            return False
        raise self._unexpected("the end of the turn or another call")

    def _result(self) -> bool:
        length = self._scanner.feed(self._waiting) if self._fence_close else len(self._waiting)
        if length:
            fragment, self._waiting = self._waiting[:length], self._waiting[length:]
            self._json.append(fragment)
            self._events.append(ObjectDelta(fragment))
        if self._waiting and not self._fence_close.startswith(self._waiting):
            raise self._unexpected("the end of the fence around the result")
        return False

    def _take(self, expected: str) -> bool:
        found = self._waiting.startswith(expected)
        if found:
            self._waiting = self._waiting[len(expected) :]
        return found

    def _say(self, text: str) -> None:
        if text:
            self._text.append(text)
            self._events.append(TextDelta(text))

    def _unexpected(self, wanted: str) -> GrammarError:
        return GrammarError(f"the turn goes on with {self._waiting[:40]!r} in place of {wanted}")


def _possible_start(text: str, marker: str) -> int:
    """Where in ``text`` an unfinished ``marker`` begins; the end of the text if there is none."""
    for length in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:length]):
            return len(text) - length
    return len(text)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise GrammarError(f"the turn breaks off or is no JSON: {error}: {text[-60:]!r}") from error
