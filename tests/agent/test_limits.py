"""Usage adds up, limits bind, and the innermost limits count from where they came into force."""

from __future__ import annotations

import math

import pytest

from dspark_agent import RequestUsage, RunUsage, UsageLimitExceeded, UsageLimits, UserError, budget
from dspark_agent.budget import Budget


def used(**counts: int) -> RunUsage:
    return RunUsage(**counts)


def test_a_run_adds_up_its_turns() -> None:
    usage = RunUsage()
    usage.add_turn(RequestUsage(input_tokens=10, cached_tokens=4, output_tokens=2))
    earlier = usage.model_copy()
    usage.add_turn(RequestUsage(input_tokens=20, cached_tokens=12, output_tokens=3))
    assert usage == used(requests=2, input_tokens=30, cached_tokens=16, output_tokens=5)
    assert usage.since(earlier) == used(
        requests=1, input_tokens=20, cached_tokens=12, output_tokens=3
    )


@pytest.mark.parametrize(
    ("limits", "usage", "name"),
    [
        (UsageLimits(request_limit=2), used(requests=2), "request_limit"),
        (UsageLimits(output_tokens_limit=5), used(output_tokens=5), "output_tokens_limit"),
    ],
)
def test_a_turn_past_a_limit_is_refused(limits: UsageLimits, usage: RunUsage, name: str) -> None:
    limits.check_request(RunUsage())
    with pytest.raises(UsageLimitExceeded, match=name) as caught:
        limits.check_request(usage)
    assert caught.value.limit_name == name
    assert caught.value.used == caught.value.limit + 1


def test_tool_calls_are_counted_before_they_run() -> None:
    limits = UsageLimits(tool_calls_limit=3)
    limits.check_tool_calls(used(tool_calls=1), 2)
    with pytest.raises(UsageLimitExceeded, match="tool_calls_limit of 3"):
        limits.check_tool_calls(used(tool_calls=2), 2)


def test_no_limit_is_no_limit() -> None:
    limits = UsageLimits(request_limit=None, repeat_call_limit=None)
    limits.check_request(used(requests=10**6, output_tokens=10**9))
    limits.check_tool_calls(RunUsage(), 10**6)
    assert limits.output_tokens_left(RunUsage()) is None


def test_negative_limits_are_refused() -> None:
    with pytest.raises(UserError, match="wall_seconds"):
        UsageLimits(wall_seconds=-1)


def test_budgets_count_from_where_they_began() -> None:
    session = Budget(UsageLimits(request_limit=5, output_tokens_limit=100), RunUsage(), 50.0)
    run = Budget(
        UsageLimits(request_limit=2, repeat_call_limit=3), used(requests=3), deadline=math.inf
    )
    budgets = (session, run)
    budget.check_request(budgets, used(requests=4))
    with pytest.raises(UsageLimitExceeded):
        budget.check_request(budgets, used(requests=5))
    assert budget.output_tokens_left(budgets, used(requests=3, output_tokens=70)) == 30
    assert budget.deadline(budgets) == 50.0
    assert budget.repeat_call_limit(budgets) == 3
    assert budget.repeat_call_limit(()) == UsageLimits().repeat_call_limit
