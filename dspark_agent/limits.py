"""How much a run may use, and how much it has used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

from pydantic import BaseModel, NonNegativeInt, PrivateAttr

from dspark_agent.errors import ContextLengthError, UsageLimitExceeded, UserError


class RequestUsage(BaseModel):
    """Tokens of one model turn. ``input_tokens`` counts the whole context of the turn, of which
    ``cached_tokens`` were not computed again."""

    input_tokens: NonNegativeInt = 0
    cached_tokens: NonNegativeInt = 0
    output_tokens: NonNegativeInt = 0


class RunUsage(RequestUsage):
    """What a run (or a session so far) has used: sums over its model turns.

    A run that is part of another (``parent=ctx``) counts in both accounts, as it goes.
    """

    requests: NonNegativeInt = 0
    tool_calls: NonNegativeInt = 0
    _whole: RunUsage | None = PrivateAttr(default=None)

    @classmethod
    def part_of(cls, whole: RunUsage | None) -> RunUsage:
        """An empty account; what is counted in it is counted in ``whole`` too."""
        part = cls()
        part._whole = whole
        return part

    def count_request(self) -> None:
        """Count one model turn, when it begins: turns taken at the same time see each other."""
        self._count_requests(1)

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count the model turn taken inside; one that does not fit into the model's window was
        none."""
        self.count_request()
        try:
            yield
        except ContextLengthError:
            self._count_requests(-1)
            raise

    def _count_requests(self, turns: int) -> None:
        for account in self._accounts():
            account.requests += turns

    def count_tokens(self, turn: RequestUsage) -> None:
        """Count the tokens of one model turn."""
        for account in self._accounts():
            account.input_tokens += turn.input_tokens
            account.cached_tokens += turn.cached_tokens
            account.output_tokens += turn.output_tokens

    def count_tool_calls(self, calls: int) -> None:
        """Count tool calls, before they are run."""
        for account in self._accounts():
            account.tool_calls += calls

    def _accounts(self) -> Iterator[RunUsage]:
        account: RunUsage | None = self
        while account is not None:
            yield account
            account = account._whole

    def since(self, earlier: RunUsage) -> RunUsage:
        """What was used after ``earlier`` was copied from this account."""
        return RunUsage(
            **{n: getattr(self, n) - getattr(earlier, n) for n in RunUsage.model_fields}
        )


@dataclass(frozen=True, slots=True)
class UsageLimits:
    """Limits of a run, a session or a step; None is no limit.

    ``request_limit``: model turns. ``tool_calls_limit``: tool calls executed.
    ``output_tokens_limit``: new tokens over all turns; a turn gets no more than what is left.
    ``repeat_call_limit``: how often a call may be repeated with the same arguments while no other
    call is made in between; every repetition is pointed out to the model, and past the limit the
    tool is taken out of the next step's choice (0: at the first repetition; None: never).
    ``wall_seconds``: wall clock, tools included; past it the work is cancelled.
    """

    request_limit: int | None = 50
    tool_calls_limit: int | None = None
    output_tokens_limit: int | None = None
    repeat_call_limit: int | None = 1
    wall_seconds: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and value < 0:
                raise UserError(f"UsageLimits({field.name}={value}): must not be negative")

    def check_request(self, used: RunUsage) -> None:
        """Raise :class:`UsageLimitExceeded` unless one more model turn is allowed."""
        if self.request_limit is not None and used.requests >= self.request_limit:
            raise UsageLimitExceeded(
                "request_limit", limit=self.request_limit, used=used.requests + 1, limits=self
            )
        if self.output_tokens_limit is not None and used.output_tokens >= self.output_tokens_limit:
            raise UsageLimitExceeded(
                "output_tokens_limit",
                limit=self.output_tokens_limit,
                used=used.output_tokens + 1,
                limits=self,
            )

    def check_tool_calls(self, used: RunUsage, calls: int) -> None:
        """Raise :class:`UsageLimitExceeded` unless ``calls`` more tool calls are allowed."""
        if self.tool_calls_limit is not None and used.tool_calls + calls > self.tool_calls_limit:
            raise UsageLimitExceeded(
                "tool_calls_limit",
                limit=self.tool_calls_limit,
                used=used.tool_calls + calls,
                limits=self,
            )

    def output_tokens_left(self, used: RunUsage) -> int | None:
        """How many new tokens the next turn may write; None where there is no limit."""
        if self.output_tokens_limit is None:
            return None
        return max(0, self.output_tokens_limit - used.output_tokens)
