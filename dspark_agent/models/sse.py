"""Server-sent events (HTML standard, section 9.2), as chat-completions servers use them."""

from __future__ import annotations

DONE = "[DONE]"
"""What servers send as the last event's data."""


class EventDecoder:
    """Takes a stream's lines in order; gives the data of each event that is complete."""

    def __init__(self) -> None:
        self._data: list[str] = []

    def feed(self, line: str) -> str | None:
        """The data of the event that ``line`` (without its line end) completes.

        None where it completes none, and for the last event; comments and other fields are passed
        over.
        """
        if line.startswith("data:"):
            self._data.append(line.removeprefix("data:").removeprefix(" "))
        if line or not self._data:
            return None
        text, self._data = "\n".join(self._data), []
        return None if text == DONE else text
