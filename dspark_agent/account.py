"""What a conversation has used, and the limits it is under."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import anyio

from dspark_agent import budget
from dspark_agent.budget import Budget
from dspark_agent.context import Cancellation, RunContext
from dspark_agent.errors import DeadlineExceeded, RunCancelled
from dspark_agent.limits import RunUsage, UsageLimits


@dataclass(frozen=True, slots=True)
class Work:
    """A stretch of work under limits: a session's step, a run, a step of a run."""

    budgets: tuple[Budget, ...]
    cancellation: Cancellation


class Account:
    """What a conversation has used, and its limits; as part of ``parent``'s run, if it is one."""

    def __init__(self, parent: RunContext[Any] | None = None) -> None:
        self.parent = parent
        self.usage = RunUsage.part_of(None if parent is None else parent.usage)
        self.budgets: tuple[Budget, ...] = () if parent is None else parent.budgets

    def limit(self, limits: UsageLimits) -> None:
        """Put all work to come under ``limits`` too, which count from now."""
        self.budgets = (*self.budgets, Budget.begin(limits, self.usage))

    @property
    def whole(self) -> Work:
        """What is in force around everything done here."""
        return Work(self.budgets, self._inherited())

    @contextmanager
    def work(self, limits: UsageLimits | None, outer: Work | None = None) -> Iterator[Work]:
        """Work under ``limits``, within those of ``outer`` (or the session's, or the parent's).

        Raises:
            DeadlineExceeded: the deadline passed inside.
            RunCancelled: :meth:`RunContext.cancel` was called inside.
        """
        budgets = self.budgets if outer is None else outer.budgets
        if limits is not None:
            budgets = (*budgets, Budget.begin(limits, self.usage))
        with anyio.CancelScope(deadline=budget.deadline(budgets)) as scope:
            around = self._inherited() if outer is None else outer.cancellation
            own = around.scope is None  # nothing runs around this: cancelling ends this
            cancellation = Cancellation(scope) if own else around
            yield Work(budgets, cancellation)
        if own and cancellation.reason is not None:
            raise RunCancelled(cancellation.reason)
        if scope.cancelled_caught:
            first = min(budgets, key=lambda b: b.deadline)
            raise DeadlineExceeded(first.limits.wall_seconds or 0.0)

    def _inherited(self) -> Cancellation:
        return Cancellation() if self.parent is None else self.parent.cancellation
