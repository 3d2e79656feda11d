"""Who leaves the queue next: precedence, and that nobody waits forever."""

from __future__ import annotations

import math
import random
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_backend.request import Urgency
from dspark_backend.scheduler import precedence
from dspark_backend.waiting import WaitingLine

ORDER = [Urgency.CRITICAL, Urgency.INTERACTIVE, Urgency.BACKGROUND]


def drained(line: WaitingLine[str]) -> str:
    return "".join(line.take() for _ in range(len(line)))


def test_urgency_then_deadline_then_arrival() -> None:
    line: WaitingLine[str] = WaitingLine(patience=100)
    line.add("f", Urgency.BACKGROUND, 0.0)
    line.add("d", Urgency.INTERACTIVE)
    line.add("e", Urgency.INTERACTIVE)
    line.add("c", Urgency.INTERACTIVE, 5.0)
    line.add("b", Urgency.CRITICAL)
    line.add("a", Urgency.CRITICAL, 9.0)
    assert line.next == "a"
    assert list(line) == ["f", "d", "e", "c", "b", "a"]
    assert drained(line) == "abcdef"
    assert line.next is None
    with pytest.raises(IndexError, match="nobody"):
        line.take()


def test_the_oldest_is_overtaken_so_often_and_no_more() -> None:
    line: WaitingLine[str] = WaitingLine(patience=2)
    line.add("x", Urgency.BACKGROUND)
    for name in "abcde":
        line.add(name, Urgency.CRITICAL)
    assert drained(line) == "abxcde"


def test_who_gives_up_is_passed_over() -> None:
    line: WaitingLine[str] = WaitingLine(patience=1)
    for name, urgency in zip("abc", ORDER, strict=True):
        line.add(name, urgency)
    line.remove("a")
    assert len(line) == 2
    assert drained(line) == "bc"
    with pytest.raises(KeyError):
        line.remove("a")


arrivals = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(ORDER), st.sampled_from([0.0, 1.0, 2.0, math.inf])),
        st.sampled_from(["take", "remove"]),
    ),
    max_size=60,
)


@given(arrivals, st.integers(0, 3), st.randoms())
def test_it_does_what_a_sorted_list_does(
    events: list[tuple[Urgency, float] | str], patience: int, rng: random.Random
) -> None:
    line: WaitingLine[int] = WaitingLine(patience)
    there: list[tuple[tuple[int, float, int], int]] = []
    overtaken, number = 0, count()
    for event in events:
        if isinstance(event, tuple):
            item = next(number)
            line.add(item, *event)
            there.append((precedence(*event, item), item))
        elif there:
            oldest = min(there, key=lambda entry: entry[1])
            if event == "remove":
                gone = rng.choice(there)
                line.remove(gone[1])
                overtaken = 0 if gone == oldest else overtaken
            else:
                gone = oldest if overtaken >= patience else min(there)
                assert line.take() == gone[1]
                overtaken = 0 if gone == oldest else overtaken + 1
            there.remove(gone)
        assert len(line) == len(there)


@given(st.randoms(), st.integers(1, 6))
def test_nobody_starves_whatever_arrives_later(rng: random.Random, patience: int) -> None:
    line: WaitingLine[int] = WaitingLine(patience)
    bound: dict[int, int] = {}
    taken = 0
    for item in range(120):
        # More urgent work arrives all the time, and faster than steps leave.
        urgency = rng.choices(ORDER, [6, 2, 1])[0]
        bound[item] = taken + (len(line) + 1) * (patience + 1)
        line.add(item, urgency, rng.choice([math.inf, rng.random()]))
        if rng.random() < 0.6:
            taken += 1
            assert taken <= bound.pop(line.take())
    while line:
        taken += 1
        assert taken <= bound.pop(line.take())
    assert not bound


def test_ten_thousand_waiting_steps_cost_each_other_little() -> None:
    class Counted(int):
        compared = 0

        def __lt__(self, other: int) -> bool:
            Counted.compared += 1
            return int(self) < int(other)

    line: WaitingLine[int] = WaitingLine()
    rng = random.Random(5)
    size = 10_000
    for item in range(size):
        line.add(item, rng.choice(ORDER), Counted(rng.randrange(1000)))
    for item in rng.sample(range(size), size // 2):
        line.remove(item)
    left = [line.take() for _ in range(len(line))]
    assert len(set(left)) == size // 2
    assert Counted.compared < 60 * size  # n log n; a scan for each would be 5,000 a step
