"""When a conversation gets too long for the model's context, and what is left of it then."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from dspark_agent.errors import UserError
from dspark_agent.messages import (
    ModelRequest,
    ModelResponse,
    RequestPart,
    RetryPromptPart,
    SystemPromptPart,
    ToolReturnPart,
    UserPromptPart,
    open_calls,
)

Messages = Sequence[ModelRequest | ModelResponse]
Summarise = Callable[[Messages], str | Awaitable[str]]

SUMMARY_REQUEST = (
    "The conversation is about to be shortened. Write down what has to be known to go on: what was "
    "asked for, what was found out and done, and what is still to do. Write nothing else."
)
STILL_TO_COME = "(This result follows later.)"


@dataclass(frozen=True, slots=True)
class Compaction:
    """``Agent(compaction=Compaction())``: shorten conversations that fill the context window.

    Before a step that begins with more than ``at`` of the window in use, or whose turn does not fit
    into it, the oldest messages are replaced by a summary. Every time is told by a
    :class:`ContextCompacted` event, which the result keeps, with the messages that were left out.
    Without a Compaction, a step that does not fit raises :class:`ContextLengthError`.

    Args:
        at: share of the window, in (0, 1]. Room for the summary is left in any case.
        window: tokens the context holds; None asks the model. Where neither knows (a remote
            model), only a turn that does not fit is a reason.
        keep_turns: how many of the last model turns stay word for word, at most.
        summary_tokens: how long a summary may be.
        summarise: writes the summary of the messages left out; by default the model itself, on a
            fork of the session (one more request of the run's usage).

    Raises:
        UserError: a number is out of its range.
    """

    at: float = 0.8
    window: int | None = None
    keep_turns: int = 2
    summary_tokens: int = 256
    summarise: Summarise | None = None

    def __post_init__(self) -> None:
        if not 0 < self.at <= 1:
            raise UserError(f"Compaction(at={self.at}): a share of the window, above 0, at most 1")
        for name in ("window", "keep_turns", "summary_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"Compaction({name}={value}): must be at least 1")

    def is_due(self, context_tokens: int, window: int | None) -> bool:
        """Whether a conversation of ``context_tokens`` should be shortened before it goes on;
        ``window`` is what the model says that it holds."""
        window = self.window or window
        if window is None:
            return False
        return context_tokens > min(self.at * window, window - 2 * self.summary_tokens)


def first_kept(messages: Messages, keep_turns: int) -> int | None:
    """Index of the first message that stays; None where there is nothing to leave out.

    The last ``keep_turns`` responses stay (at least one goes), with the question before the first
    of them. A call is never parted from its result.
    """
    responses = [i for i, message in enumerate(messages) if isinstance(message, ModelResponse)]
    if len(responses) < 2:
        return None
    kept = responses[-min(keep_turns, len(responses) - 1)]
    asked = messages[kept - 1]
    return kept - 1 if isinstance(asked, ModelRequest) and not _answers_calls(asked) else kept


def shortened(messages: Messages, kept: int, summary: str) -> list[ModelRequest | ModelResponse]:
    """The conversation from ``kept`` on, after its instructions and ``summary``."""
    head: list[RequestPart] = [
        part for part in messages[0].parts if isinstance(part, SystemPromptPart)
    ]
    note = f"Summary of the conversation so far ({kept} messages are left out):\n{summary}"
    head.append(UserPromptPart(content=note))
    first, rest = messages[kept], messages[kept + 1 :]
    if isinstance(first, ModelRequest):
        return [ModelRequest(parts=(*head, *first.parts)), *rest]
    return [ModelRequest(parts=tuple(head)), first, *rest]


def new_index(messages: Messages, kept: int, index: int) -> int:
    """Where the message at ``index`` is once the conversation is :func:`shortened`; of one that
    was left out, where the first one is that stayed."""
    before = 0 if isinstance(messages[kept], ModelRequest) else 1
    return max(index, kept) - kept + before


def summary_request(messages: Messages, sent: int, kept: int) -> list[ModelRequest | ModelResponse]:
    """What to tell a model that knows the first ``sent`` messages, for it to sum up the first
    ``kept``.

    Results that it has not seen (perhaps they are what does not fit) are only promised.
    """
    told = list(messages[: max(sent, kept)])
    missing: list[RequestPart] = [
        ToolReturnPart(
            tool_name=call.tool_name, content=STILL_TO_COME, tool_call_id=call.tool_call_id
        )
        for call in open_calls(told)
    ]
    asked = (*missing, UserPromptPart(content=SUMMARY_REQUEST))
    news = told[sent:]
    if news and isinstance(news[-1], ModelRequest):
        return [*news[:-1], ModelRequest(parts=(*news[-1].parts, *asked))]
    return [*news, ModelRequest(parts=asked)]


def _answers_calls(request: ModelRequest) -> bool:
    return any(
        isinstance(part, ToolReturnPart)
        or (isinstance(part, RetryPromptPart) and part.tool_name is not None)
        for part in request.parts
    )
