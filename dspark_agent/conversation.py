"""What a session has said and heard so far: copied before a step, put back if it fails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dspark_agent.events import ContextCompacted
from dspark_agent.execution import RetryCount
from dspark_agent.messages import ModelRequest, ModelResponse, RequestPart, open_calls
from dspark_agent.repeats import RepeatGuard
from dspark_agent.step import StepResult


@dataclass(slots=True)
class Conversation:
    """``sent`` counts the messages the model session knows; the rest goes with the next turn.

    ``told`` are the answer formats that the messages have told the model already;
    ``context_tokens`` is the context's length after the last turn, 0 where it is not known;
    ``run_begin`` the index of the first message of the run that goes on.
    """

    messages: list[ModelRequest | ModelResponse] = field(default_factory=list)
    sent: int = 0
    steps: list[StepResult[Any]] = field(default_factory=list)
    retries: RetryCount = field(default_factory=RetryCount)
    repeats: RepeatGuard = field(default_factory=RepeatGuard)
    told: frozenset[str] = frozenset()
    context_tokens: int = 0
    compactions: list[ContextCompacted] = field(default_factory=list)
    run_begin: int = 0

    def copy(self) -> Conversation:
        return replace(
            self,
            messages=list(self.messages),
            steps=list(self.steps),
            retries=self.retries.copy(),
            repeats=self.repeats.copy(),
            compactions=list(self.compactions),
        )

    @property
    def unsent(self) -> list[ModelRequest | ModelResponse]:
        """The messages that the model has not seen yet."""
        return self.messages[self.sent :]

    @property
    def has_news(self) -> bool:
        """Whether there is a request the model has not answered."""
        return bool(self.messages) and isinstance(self.messages[-1], ModelRequest)

    @property
    def has_open_calls(self) -> bool:
        """Whether the last response holds calls that nobody has run."""
        return bool(open_calls(self.messages))

    def ask(self, *parts: RequestPart) -> None:
        """Add parts to the request that goes with the next turn."""
        if not parts:
            return
        last = self.messages[-1] if self.unsent else None
        if isinstance(last, ModelRequest):
            self.messages[-1] = ModelRequest(parts=(*last.parts, *parts))
        else:
            self.messages.append(ModelRequest(parts=parts))

    def answer(self, parts: Sequence[RequestPart]) -> None:
        """Add the results of calls that had waited; all results are in the order of the calls."""
        answered: tuple[RequestPart, ...] = ()
        last = self.messages[-1]
        if isinstance(last, ModelRequest):
            answered = last.parts
            self.messages.pop()
            last = self.messages[-1]
        assert isinstance(last, ModelResponse)
        order = {call.tool_call_id: place for place, call in enumerate(last.tool_calls)}

        def place(part: RequestPart) -> int:
            call_id = getattr(part, "tool_call_id", None)
            return len(order) if call_id is None else order.get(call_id, len(order))

        self.messages.append(ModelRequest(parts=tuple(sorted((*answered, *parts), key=place))))

    def heard(self, response: ModelResponse) -> None:
        """Add the model's response; everything before it counts as sent."""
        self.messages.append(response)
        self.sent = len(self.messages)
        self.context_tokens = response.usage.input_tokens + response.usage.output_tokens
