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
    usage.count_request()
    usage.count_tokens(RequestUsage(input_tokens=10, cached_tokens=4, output_tokens=2))
    earlier = usage.model_copy()
    usage.count_request()
    usage.count_tokens(RequestUsage(input_tokens=20, cached_tokens=12, output_tokens=3))
    assert usage == used(requests=2, input_tokens=30, cached_tokens=16, output_tokens=5)
    assert usage.since(earlier) == used(
        requests=1, input_tokens=20, cached_tokens=12, output_tokens=3
    )


def test_a_part_counts_in_the_whole_as_it_goes() -> None:
    whole = used(requests=1)
    part = RunUsage.part_of(whole)
    inner = RunUsage.part_of(part)
    inner.count_request()
    inner.count_tokens(RequestUsage(input_tokens=7, output_tokens=2))
    part.count_tool_calls(3)
    assert inner.since(RunUsage()) == used(requests=1, input_tokens=7, output_tokens=2)
    assert part.since(RunUsage()) == used(requests=1, input_tokens=7, output_tokens=2, tool_calls=3)
    assert whole == used(requests=2, input_tokens=7, output_tokens=2, tool_calls=3)
    assert RunUsage.model_validate_json(inner.model_dump_json()) == inner.since(RunUsage())


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
    account = used(requests=3)
    session = Budget(
        UsageLimits(request_limit=5, output_tokens_limit=100), account, RunUsage(), 50.0
    )
    limits = UsageLimits(request_limit=2, repeat_call_limit=3)
    run = Budget(limits, account, account.model_copy(), math.inf)
    budgets = (session, run)
    account.count_request()
    budget.check_request(budgets)
    account.count_request()
    with pytest.raises(UsageLimitExceeded, match="request_limit of 5"):
        budget.check_request(budgets)
    with pytest.raises(UsageLimitExceeded) as caught:
        budget.check_request((run,))
    assert caught.value.limits is limits
    account.count_tokens(RequestUsage(output_tokens=70))
    assert budget.output_tokens_left(budgets) == 30
    assert budget.deadline(budgets) == 50.0
    assert budget.repeat_call_limit(budgets) == 3
    assert budget.repeat_call_limit(()) == UsageLimits().repeat_call_limit
