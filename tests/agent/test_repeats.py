"""Repeated calls: counted since the last new one, pointed out, and barred."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from dspark_agent import ToolCallPart
from dspark_agent.repeats import RepeatGuard


def call(name: str, **args: object) -> ToolCallPart:
    return ToolCallPart(tool_name=name, args=args)


def after(*calls: ToolCallPart) -> RepeatGuard:
    guard = RepeatGuard()
    for one in calls:
        guard.record([one])
    return guard


def test_the_first_call_is_no_repetition_and_the_second_is_pointed_out() -> None:
    guard = RepeatGuard()
    assert guard.record([call("read", path="a")]) == [None]
    (note,) = guard.record([call("read", path="a")])
    assert note is not None
    assert "call number 2 of read" in note


def test_argument_order_makes_no_other_call() -> None:
    guard = after(call("edit", old="a", new="b"), call("edit", new="b", old="a"))
    assert guard.barred(0) == {"edit"}


def test_a_tool_is_barred_past_the_limit() -> None:
    guard = after(call("read", path="a"), call("read", path="a"))
    assert guard.barred(0) == {"read"}
    assert guard.barred(1) == set()
    guard.record([call("read", path="a")])
    assert guard.barred(1) == {"read"}
    assert guard.barred(None) == set()


def test_running_the_tests_after_every_edit_is_no_repetition() -> None:
    edits = [step for n in range(9) for step in (call("edit", n=n), call("run_tests"))]
    assert after(*edits).barred(0) == set()


def test_going_round_in_circles_is() -> None:
    circle = [call("read", path="a"), call("run_tests")] * 4
    assert after(*circle).barred(1) == {"read", "run_tests"}


def test_a_new_call_opens_what_was_barred() -> None:
    guard = after(*[call("read", path="a")] * 5)
    guard.record([call("read", path="b")])
    assert guard.barred(0) == set()


def test_the_same_call_twice_in_one_step_is_a_repetition() -> None:
    guard = RepeatGuard()
    notes = guard.record([call("read", path="a"), call("read", path="a")])
    assert notes[0] is None
    assert notes[1] is not None


def test_a_copy_counts_for_itself() -> None:
    guard = after(call("read", path="a"))
    guard.copy().record([call("read", path="a")])
    assert guard.barred(0) == set()


@given(st.lists(st.sampled_from("abcd"), max_size=30), st.integers(0, 3))
def test_against_the_definition(names: Sequence[str], limit: int) -> None:
    guard = after(*[call(name) for name in names])
    last_new = max((i for i, n in enumerate(names) if n not in names[:i]), default=0)
    since = names[last_new:]
    assert guard.barred(limit) == {name for name in names if since.count(name) - 1 > limit}
