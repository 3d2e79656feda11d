"""Where a JSON value ends in a text that is still being written."""

from __future__ import annotations

import re


class ObjectScanner:
    """Finds where a JSON object or array ends in a text that arrives in pieces.

    ``closed`` says that it has ended. The text is taken to be JSON: nothing else is checked.
    """

    _STOPS = re.compile(r'[{}\[\]"\\]')

    def __init__(self) -> None:
        self.closed = False
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def feed(self, text: str) -> int:
        """How many characters of ``text`` belong to the value."""
        place = 0
        while place < len(text) and not self.closed:
            if self._escaped:
                self._escaped = False
                place += 1
                continue
            stop = self._STOPS.search(text, place)
            if stop is None:
                return len(text)
            place = stop.end()
            self._step(stop[0])
        return place

    def _step(self, char: str) -> None:
        if self._in_string:
            self._escaped = char == "\\"
            self._in_string = char != '"'
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            self.closed = self._depth == 0
