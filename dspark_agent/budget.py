"""The limits that are in force around a step: the whole's, the session's, the run's, its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import anyio

from dspark_agent.limits import RunUsage, UsageLimits


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits, counted from where they came into force.

    ``account`` is what they limit, live; ``start`` a copy of it from the beginning. ``deadline``
    is on the event loop's clock, ``inf`` when there is none.
    """

    limits: UsageLimits
    account: RunUsage
    start: RunUsage
    deadline: float

    @classmethod
    def begin(cls, limits: UsageLimits, account: RunUsage) -> Budget:
        """Limits that count from now and from what ``account`` holds."""
        seconds = limits.wall_seconds
        deadline = math.inf if seconds is None else anyio.current_time() + seconds
        return cls(limits, account, account.model_copy(), deadline)

    @property
    def used(self) -> RunUsage:
        """What was used since the limits came into force."""
        return self.account.since(self.start)


def check_request(budgets: Sequence[Budget]) -> None:
    """Raise :class:`UsageLimitExceeded` unless every budget allows one more model turn."""
    for budget in budgets:
        budget.limits.check_request(budget.used)


def check_tool_calls(budgets: Sequence[Budget], calls: int) -> None:
    """Raise :class:`UsageLimitExceeded` unless every budget allows ``calls`` more tool calls."""
    for budget in budgets:
        budget.limits.check_tool_calls(budget.used, calls)


def limits_tool_calls(budgets: Sequence[Budget]) -> bool:
    """Whether any budget limits how many tool calls are executed."""
    return any(budget.limits.tool_calls_limit is not None for budget in budgets)


def output_tokens_left(budgets: Sequence[Budget]) -> int | None:
    """How many new tokens every budget allows the next turn; None where none limits them."""
    lefts = [budget.limits.output_tokens_left(budget.used) for budget in budgets]
    return min((left for left in lefts if left is not None), default=None)


def repeat_call_limit(budgets: Sequence[Budget]) -> int | None:
    """The innermost budget's limit; the default one where no budget is in force."""
    limits = budgets[-1].limits if budgets else UsageLimits()
    return limits.repeat_call_limit


def deadline(budgets: Sequence[Budget]) -> float:
    """The earliest deadline, ``inf`` when there is none."""
    return min((budget.deadline for budget in budgets), default=math.inf)
