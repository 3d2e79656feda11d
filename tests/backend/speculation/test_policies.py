"""Budget policies against brute force over all length vectors, on cost curves of every shape."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest

from dspark_backend.speculation.candidate import BudgetError, BudgetPolicy, Candidate
from dspark_backend.speculation.parking import worth_drafting
from dspark_backend.speculation.policies import Fixed, Threshold, named
from dspark_backend.speculation.step_aware import StepAware
from dspark_backend.speculation.throughput import PrefixThroughput, StaleCapacity

TRIALS = 700


@dataclass(frozen=True)
class Curve:
    """``table[rows - 1]`` seconds a pass, the last slope beyond it; a drafter call costs ``draft``
    and ``anchor`` more for every anchor."""

    table: tuple[float, ...]
    draft: float = 0.0
    anchor: float = 0.0
    position: float = 0.0

    def verify_s(self, rows: int, requests: int, context: int) -> float:
        last = len(self.table)
        beyond = max(0, rows - last)
        slope = max(self.table[-1] - self.table[-2], 0.0)
        return self.table[min(rows, last) - 1] + beyond * slope + self.position * context

    def draft_s(self, anchors: int) -> float:
        return self.draft + self.anchor * anchors if anchors else 0.0


def convex(rng: random.Random, rows: int = 40) -> Curve:
    """Steps never shrink: flat, then steeper and steeper."""
    steps = sorted(rng.choice([0.0, rng.uniform(0, 0.3)]) for _ in range(rows - 1))
    return _curve(rng, steps)


def staircase(rng: random.Random, rows: int = 40) -> Curve:
    """Flat within a tile of rows, a jump between tiles."""
    tile, jump = rng.randint(2, 5), rng.uniform(0.1, 1.5)
    return _curve(rng, [jump if row % tile == 0 else 0.0 for row in range(1, rows)])


def jagged(rng: random.Random, rows: int = 40) -> Curve:
    """Any positive curve at all: it may fall as well."""
    return Curve(tuple(rng.uniform(0.5, 3.0) for _ in range(rows)), *_drafting(rng))


SHAPES = {"convex": convex, "staircase": staircase, "jagged": jagged}


def candidate(rng: random.Random, most: int = 4) -> Candidate:
    """Random, with free tokens, caps, zeros, ties and weights among them."""
    free = rng.choice([0, 0, 0, 1, 2])
    survival, value = [1.0] * free, 1.0
    for _ in range(rng.randint(0, most)):
        value *= rng.choice([0.0, 0.5, 0.5, 1.0, *(rng.random() for _ in range(8))])
        survival.append(value)
    return Candidate(
        tuple(survival),
        base_rows=rng.choice([1, 1, 1, 3]),
        context=rng.randint(0, 5),
        weight=rng.choice([1.0, 1.0, 0.25, 4.0, rng.uniform(0.1, 3)]),
        cap=rng.choice([None, None, 0, 1, 3]),
        free=free,
        drafted=rng.random() < 0.8,
    )


def every_choice(candidates: Sequence[Candidate]) -> list[tuple[int, ...]]:
    ranges = []
    for each in candidates:
        end = len(each.survival) if each.cap is None else min(len(each.survival), each.cap)
        ranges.append(range(min(each.free, end), end + 1))
    return list(itertools.product(*ranges))


def weighted_tokens(candidates: Sequence[Candidate], lengths: Sequence[int]) -> float:
    return sum(
        each.weight * (1.0 + sum(each.survival[each.free : length]))
        for each, length in zip(candidates, lengths, strict=True)
    )


def verify_seconds(candidates: Sequence[Candidate], lengths: Sequence[int], curve: Curve) -> float:
    rows = sum(each.base_rows for each in candidates) + sum(lengths)
    return curve.verify_s(rows, len(candidates), sum(each.context for each in candidates))


def cycle_rate(candidates: Sequence[Candidate], lengths: Sequence[int], curve: Curve) -> float:
    drafted = curve.draft_s(sum(each.drafted and bool(each.survival) for each in candidates))
    tokens = weighted_tokens(candidates, lengths)
    return tokens / (drafted + verify_seconds(candidates, lengths, curve))


def _curve(rng: random.Random, steps: Sequence[float]) -> Curve:
    return Curve(tuple(itertools.accumulate(steps, initial=rng.uniform(0.3, 3))), *_drafting(rng))


def _drafting(rng: random.Random) -> tuple[float, float, float]:
    return rng.choice([0.0, rng.uniform(0, 1)]), rng.uniform(0, 0.2), rng.choice([0.0, 0.05])


def trials(shape: str, count: int = TRIALS, most: int = 4) -> list[tuple[list[Candidate], Curve]]:
    rng = random.Random(f"{shape} {most}")
    return [
        ([candidate(rng, most) for _ in range(rng.randint(1, 3))], SHAPES[shape](rng))
        for _ in range(count)
    ]


@pytest.mark.parametrize("shape", SHAPES)
def test_step_aware_is_the_optimum_on_curves_of_every_shape(shape: str) -> None:
    """The cost here depends on the drafts through their number alone: then no shape defeats it."""
    speculated = parked = 0
    for candidates, curve in trials(shape):
        choices = every_choice(candidates)
        lengths = tuple(StepAware().lengths(candidates, curve))
        assert lengths in choices
        best = max(cycle_rate(candidates, each, curve) for each in choices)
        plain = weighted_tokens(candidates, choices[0]) / verify_seconds(
            candidates, choices[0], curve
        )
        if best >= plain:
            assert cycle_rate(candidates, lengths, curve) == pytest.approx(best, rel=1e-12)
            speculated += any(lengths)
            continue

        # The draft is paid for: what counts is what verifying earns at the rate of plain decoding.
        def surplus(each: Sequence[int]) -> float:
            seconds = verify_seconds(candidates, each, curve)  # noqa: B023
            return weighted_tokens(candidates, each) - plain * seconds  # noqa: B023

        assert surplus(lengths) == pytest.approx(max(map(surplus, choices)), abs=1e-9)
        parked += lengths == choices[0]
    assert speculated > 50
    assert parked > 10


def test_step_aware_loses_no_more_than_the_cost_is_off() -> None:
    """Where rows of some requests cost more than the curve says (attention over a longer context),
    by a share of the pass of at most e, the rate is at least 1 / (1 + e) of the optimum."""
    rng = random.Random(5)
    worst = 1.0
    for candidates, curve in trials("staircase", 400):
        spread = 0.3
        extra = [rng.uniform(0, spread) for _ in candidates]

        def true_rate(lengths: Sequence[int]) -> float:
            rows = sum(lengths)
            if not rows:
                return cycle_rate(candidates, lengths, curve)  # noqa: B023
            off = sum(e * n for e, n in zip(extra, lengths, strict=True)) / rows  # noqa: B023
            return cycle_rate(candidates, lengths, curve) / (1.0 + off)  # noqa: B023

        lengths = StepAware().lengths(candidates, curve)
        plain = [min(each.certain, each.most) for each in candidates]
        if cycle_rate(candidates, lengths, curve) < cycle_rate(candidates, plain, curve):
            continue  # plain decoding wins, and another quantity is maximised
        best = max(map(true_rate, every_choice(candidates)))
        worst = min(worst, true_rate(lengths) / best)
        assert true_rate(lengths) >= best / (1.0 + spread) - 1e-12
    assert worst < 1.0, "these trials do not tell an optimum from a bound"


def test_algorithm_1_is_optimal_on_convex_curves_and_stops_short_on_stairs() -> None:
    def rate(candidates: Sequence[Candidate], lengths: Sequence[int], curve: Curve) -> float:
        alike = [replace(each, weight=1.0) for each in candidates]
        return weighted_tokens(alike, lengths) / verify_seconds(alike, lengths, curve)

    short = 0
    for shape in ("convex", "staircase"):
        for candidates, curve in trials(shape, 500):
            found = rate(candidates, PrefixThroughput().lengths(candidates, curve), curve)
            best = max(rate(candidates, each, curve) for each in every_choice(candidates))
            if shape == "convex":
                assert found == pytest.approx(best, rel=1e-12)
            short += found < best * 0.999
    assert short > 20


def test_stale_capacity_is_the_optimum_of_two_iterations_ago_filled_by_live_survivals() -> None:
    rng = random.Random(2)
    policy = StaleCapacity()
    curve = staircase(rng)
    seen: list[list[Candidate]] = []
    for _ in range(60):
        live = [replace(candidate(rng), weight=1.0, cap=None) for _ in range(3)]
        lengths = policy.lengths(live, curve)
        if len(seen) >= 2:
            then = seen[-2]

            def rate(each: Sequence[int], then: Sequence[Candidate] = then) -> float:
                return weighted_tokens(then, each) / verify_seconds(then, each, curve)

            best = max(map(rate, every_choice(then)))
            certain = sum(each.free for each in then)
            capacity = min(
                sum(each) - certain
                for each in every_choice(then)
                if rate(each) == pytest.approx(best, rel=1e-12)
            )
            drafts = sum(lengths) - sum(each.free for each in live)
            positive = sum(value > 0 for each in live for value in each.survival[each.free :])
            assert drafts == min(capacity, positive)
            most = max(
                weighted_tokens(live, each)
                for each in every_choice(live)
                if sum(each) == sum(lengths)
            )
            assert weighted_tokens(live, lengths) == pytest.approx(most, rel=1e-12)
        seen.append(live)
        assert len(policy.history) <= 2


def test_stale_capacity_is_taken_a_request_when_their_number_changes() -> None:
    policy, flat = StaleCapacity(), Curve((1.0, 1.0, 1.0))
    two = [Candidate((0.9, 0.8, 0.7))] * 2
    assert policy.lengths(two, flat) == policy.lengths(two, flat) == [3, 3]
    assert policy.lengths(two[:1], flat) == [3]
    assert policy.lengths(two * 2, flat) == [3, 3, 3, 3]
    assert policy.lengths([], flat) == []


POLICIES = [
    "plain",
    "fixed",
    "fixed-2",
    "threshold",
    "threshold-0.3",
    "prefix_throughput",
    "stale_capacity",
    "step_aware",
    "step_aware_sampled",
]


@pytest.mark.parametrize("name", POLICIES)
def test_caps_and_certain_tokens_are_respected(name: str) -> None:
    policy = named(name, 4)
    for shape in SHAPES:
        for candidates, curve in trials(shape, 200):
            assert tuple(policy.lengths(candidates, curve)) in every_choice(candidates)


@pytest.mark.parametrize("name", POLICIES)
def test_edges(name: str) -> None:
    policy, curve = named(name, 4), Curve((1.0, 1.5))
    assert policy.lengths([], curve) == []
    assert policy.lengths([Candidate(()), Candidate((0.9,), cap=0)], curve) == [0, 0]
    forced = Candidate((1.0, 1.0, 0.9), free=2, cap=1)
    assert policy.lengths([forced], curve) == [1]


@pytest.mark.parametrize("name", ["prefix_throughput", "step_aware", "step_aware_sampled"])
def test_no_row_is_spent_on_a_draft_that_cannot_survive(name: str) -> None:
    flat = Curve((1.0, 1.0, 1.0))
    dead = Candidate((0.0, 0.0))
    assert named(name, 4).lengths([dead, Candidate((0.5, 0.0))], flat) == [0, 1]


def test_fixed_and_threshold_count_beyond_the_certain_tokens() -> None:
    candidates = [Candidate((1.0, 0.9, 0.5, 0.4), free=1), Candidate((0.9, 0.8, 0.7))]
    curve = Curve((1.0, 2.0))
    assert Fixed(2).lengths(candidates, curve) == [3, 2]
    assert Fixed(0).lengths(candidates, curve) == [1, 0]
    assert Threshold(3, 0.5).lengths(candidates, curve) == [3, 3]
    assert Threshold(2, 0.85).lengths(candidates, curve) == [2, 1]


def test_a_step_of_the_curve_is_crossed_where_what_lies_behind_it_pays() -> None:
    tile = Curve((1.0, 1.9, 1.9, 1.9, 1.9))
    sure = [Candidate((0.8, 0.7, 0.65, 0.6))]
    assert PrefixThroughput().lengths(sure, tile) == [0]
    assert StepAware().lengths(sure, tile) == [4]
    assert StepAware(anticipating=False).lengths(sure, tile) == [4]
    # 0.5 + 0.25 + ... never earns 1.2, though four drafts as good as the first would.
    high = Curve((1.0, 2.2, 2.2, 2.2, 2.2))
    assert StepAware(anticipating=False).lengths([Candidate((0.5,) * 4)], high) == [0]


def test_weights_decide_who_gets_the_rows() -> None:
    curve = Curve((1.0, 1.0, 1.02, 9.0))
    background = Candidate((0.9,), weight=0.1)
    critical = Candidate((0.5,), weight=4.0)
    assert StepAware().lengths([background, critical], curve) == [0, 1]
    assert PrefixThroughput().lengths([background, critical], curve) == [1, 0]


def test_one_request_may_take_everything() -> None:
    curve = Curve(tuple(1.0 + 0.02 * max(0, rows - 16) for rows in range(1, 64)))
    weak = [Candidate((0.05,) * 8) for _ in range(15)]
    copied = Candidate((0.99,) * 32, drafted=False)
    lengths = StepAware(block_size=32).lengths([*weak, copied], curve)
    assert lengths[:15] == [0] * 15
    assert lengths[15] == 32


def test_the_draft_counts_while_it_can_be_saved_and_not_once_it_is_paid() -> None:
    linear = Curve((1.0, 2.0), draft=0.5)
    assert StepAware().lengths([Candidate((0.9,))], linear) == [0]
    # The longer the cycle is anyway, the less a second more matters to its rate.
    slow = Curve((1.0, 1.5), draft=1.5)
    sunk = Candidate((0.45,))
    assert weighted_tokens([sunk], [1]) / 3.0 > 1.0 / 2.5
    assert StepAware().lengths([sunk], slow) == [0]
    assert StepAware(anticipating=False).lengths([sunk], slow) == [0]
    flat = Curve((1.0, 1.0), draft=9.0)
    assert StepAware().lengths([sunk], flat) == [1]
    assert worth_drafting([sunk], flat) == [False]


@pytest.mark.parametrize(
    ("shape", "least", "mean"),
    [("convex", 1.0 - 1e-9, 1.0 - 1e-9), ("staircase", 0.8, 0.999), ("jagged", 0.4, 0.98)],
)
def test_parking_against_all_subsets(shape: str, least: float, mean: float) -> None:
    """The optimum on convex curves; on others near it, and never worse than plain decoding."""

    def rate(candidates: Sequence[Candidate], lengths: Sequence[int], curve: Curve) -> float:
        drafting = sum(n > c.certain for n, c in zip(lengths, candidates, strict=True))
        seconds = curve.draft_s(drafting) + verify_seconds(candidates, lengths, curve)
        return weighted_tokens(candidates, lengths) / seconds

    ratios, parked, drafted = [], 0, 0
    for candidates, curve in trials(shape, 400, most=3):
        chosen = worth_drafting(candidates, curve)
        choices = every_choice(candidates)
        best = max(rate(candidates, each, curve) for each in choices)
        mine = max(
            rate(candidates, each, curve)
            for each in choices
            if all(
                wanted or n == c.certain
                for n, wanted, c in zip(each, chosen, candidates, strict=True)
            )
        )
        assert mine >= rate(candidates, choices[0], curve)
        ratios.append(mine / best)
        parked += not any(chosen)
        drafted += any(chosen)
    assert min(parked, drafted) > 20
    assert min(ratios) >= least
    assert sum(ratios) / len(ratios) >= mean


def test_parking_is_exact_for_requests_that_are_alike() -> None:
    rng = random.Random(8)
    for _ in range(300):
        survival = tuple(0.9 * rng.random() ** k for k in range(rng.randint(1, 4)))
        survival = tuple(sorted(survival, reverse=True))
        alike = [Candidate(survival)] * rng.randint(1, 4)
        curve = convex(rng)
        count = sum(worth_drafting(alike, curve))

        def rate(drafting: int, alike: list[Candidate] = alike, curve: Curve = curve) -> float:
            best = 0.0
            for rows in range(drafting * len(alike[0].survival) + 1):
                full, rest = divmod(rows, drafting) if drafting else (0, 0)
                gain = drafting * sum(alike[0].survival[:full])
                gain += rest * alike[0].survival[full] if rest else 0.0
                seconds = curve.draft_s(drafting) + curve.verify_s(rows + len(alike), 1, 0)
                best = max(best, (len(alike) + gain) / seconds)
            return best

        assert rate(count) == pytest.approx(max(map(rate, range(len(alike) + 1))), rel=1e-9)


def test_parking_looks_at_every_request() -> None:
    dear = Curve((1.0, 1.05, 1.1, 3.0), draft=0.1, anchor=0.1)
    assert worth_drafting([], dear) == []
    assert worth_drafting([Candidate(())], dear) == [False]
    hopeless, likely = Candidate((0.01,)), Candidate((0.95, 0.9))
    assert worth_drafting([hopeless, likely], dear) == [False, True]
    assert worth_drafting([replace(likely, cap=0), hopeless], dear) == [False, False]
    assert worth_drafting([Candidate((1.0, 1.0), free=2)], dear) == [False]
    # An anchor costs as much as a whole pass gains from a lone draft, however sure it is.
    short, long = Candidate((0.9,)), Candidate((0.8, 0.8, 0.8))
    assert worth_drafting([short, long], Curve((1.0, 1.0), anchor=0.5)) == [False, True]


@pytest.mark.parametrize(
    "arguments",
    [
        {"survival": (0.5, 0.6)},
        {"survival": (1.5,)},
        {"survival": (float("nan"),)},
        {"survival": (0.9,), "free": 1},
        {"survival": (1.0,), "free": 2},
        {"survival": (), "base_rows": 0},
        {"survival": (), "context": -1},
        {"survival": (), "weight": 0.0},
        {"survival": (), "weight": float("inf")},
        {"survival": (), "cap": -1},
    ],
    ids=str,
)
def test_candidates_out_of_range_are_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(BudgetError):
        Candidate(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Fixed(-1),
        lambda: Threshold(3, 1.5),
        lambda: Threshold(-1, 0.5),
        lambda: StepAware(block_size=0),
        lambda: named("fixed-x", 4),
        lambda: named("greedy", 4),
    ],
)
def test_policies_out_of_range_are_refused(make: Callable[[], BudgetPolicy]) -> None:
    with pytest.raises(BudgetError):
        make()


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["prefix_throughput", "step_aware", "step_aware_sampled"])
def test_a_cost_that_is_no_time_is_refused(name: str, seconds: float) -> None:
    with pytest.raises(BudgetError, match="rows cannot take"):
        named(name, 4).lengths([Candidate((0.9,))], Curve((1.0, seconds)))
    with pytest.raises(BudgetError, match="anchors cannot take"):
        StepAware().lengths([Candidate((0.9,))], Curve((1.0, 1.0), draft=-1.0))
