"""Server-sent events (HTML standard, section 9.2), as chat-completions servers use them."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator

DONE = "[DONE]"
"""What servers send as the last event's data."""


async def event_data(lines: AsyncIterable[str]) -> AsyncIterator[str]:
    """The data of each event; comments and other fields are passed over. Ends at ``[DONE]``."""
    data: list[str] = []
    async for line in lines:
        if line.startswith("data:"):
            data.append(line.removeprefix("data:").removeprefix(" "))
        elif not line and data:
            text, data = "\n".join(data), []
            if text == DONE:
                return
            yield text
    if data and data != [DONE]:
        yield "\n".join(data)
