"""Stop strings in a stream of text."""

from __future__ import annotations

from collections.abc import Sequence

from dspark_backend.errors import RequestError


class StopStrings:
    """Ends a text at the first stop string, letting through everything that cannot be part of one.

    The stop string that is *complete* first wins, the longest among those that complete together:
    so the outcome does not depend on how the text was cut into deltas.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises RequestError for an empty stop string, which every text would match."""
        if "" in stops:
            raise RequestError("a stop string is empty; leave it out, or name the text to stop at")
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self._matched: str | None = None

    @property
    def matched(self) -> str | None:
        """The stop string that ended the text, if one did."""
        return self._matched

    def feed(self, delta: str) -> tuple[str, bool]:
        """Returns the text that is now certain to be output, and whether a stop string ended it.

        After the end all further text is dropped.
        """
        if self._matched is not None:
            return "", True
        text = self._held + delta
        found = [
            (start + len(stop), start, stop)
            for stop in self._stops
            if (start := text.find(stop)) >= 0
        ]
        if found:
            _, start, self._matched = min(found)
            self._held = ""
            return text[:start], True
        kept = self._undecided(text)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept], False

    def flush(self) -> str:
        """The text held back, once no more can come."""
        held, self._held = self._held, ""
        return held

    def _undecided(self, text: str) -> int:
        """Length of the longest end of ``text`` that a stop string could start with."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
