"""The simulator: exact where the records are, and the same every time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from dspark_backend.bench.curve import RooflineCurve, TableCurve, read_curve
from dspark_backend.bench.cycle_records import (
    CONDITIONAL,
    CycleRecord,
    Offer,
    StepRecord,
    offer_at,
    read_records,
    synthetic,
)
from dspark_backend.bench.errors import BenchError
from dspark_backend.bench.replay import Contender, mean_survivals, replay
from dspark_backend.bench.simulate import (
    POLICIES,
    SimulatedPolicy,
    SimulateSettings,
    contender,
    run_simulate,
)
from dspark_backend.request import StepKind
from dspark_backend.speculation.candidate import BudgetError, Candidate, CycleCost
from dspark_backend.speculation.policies import Fixed

UNIT = TableCurve.model_validate(
    {
        "kind": "table",
        "assumption": "a second a row, half a second an anchor",
        "rows": [1, 2],
        "verify_s": [1.0, 2.0],
        "anchors": [1, 2],
        "draft_s": [0.5, 1.0],
    }
)


def recorded(*cycles: CycleRecord, tokens: int = 6) -> StepRecord:
    return StepRecord(kind=StepKind.TEXT, context=10, tokens=tokens, cycles=cycles)


STEP = recorded(
    CycleRecord(position=0, survival=(0.8, 0.6, 0.3), accepted=2),
    CycleRecord(position=3, survival=(0.5, 0.1), accepted=0),
    CycleRecord(position=4, survival=(0.9,), accepted=1),
)


def test_a_place_between_two_records_is_offered_the_rest_of_the_earlier_proposal() -> None:
    assert offer_at(STEP, 0) == Offer((0.8, 0.6, 0.3), 2)
    assert offer_at(STEP, 1) == Offer((0.6 / 0.8, 0.3 / 0.8), 1)
    assert offer_at(STEP, 2) == Offer((0.5,), 0)
    assert offer_at(STEP, 3) == Offer((0.5, 0.1), 0)
    assert offer_at(STEP, 5) == Offer((), 0)
    dead = recorded(CycleRecord(position=0, survival=(0.4, 0.2), accepted=0))
    assert offer_at(dead, 1) == Offer()
    forced = recorded(CycleRecord(position=0, survival=(1.0, 1.0, 0.5), accepted=2, free=2))
    assert offer_at(forced, 1) == Offer((1.0, 0.5), 1, 1)


def test_a_replay_by_hand() -> None:
    """Whole blocks: 0 -> 3 (3 rows drafted, 2 held), 3 -> 4, 4 -> 6 (room for one)."""
    tally = replay([STEP], Contender(Fixed(3)), UNIT, agents=1, tokens_per_agent=6)
    assert (tally.cycles, tally.tokens, tally.drafted) == (3, 6, 3)
    assert (tally.verified, tally.held) == (3 + 2 + 1, 2 + 0 + 1)
    assert tally.seconds == pytest.approx((4 + 3 + 2) + 3 * 0.5)


def test_plain_decoding_drafts_nothing_and_takes_what_is_forced() -> None:
    forced = recorded(
        CycleRecord(position=0, survival=(1.0, 1.0, 0.5), accepted=3, free=2), tokens=5
    )
    tally = replay([forced], contender("plain", 3), UNIT, agents=1, tokens_per_agent=5)
    # Two forced tokens and one of its own in the first pass; then nothing more was recorded.
    assert (tally.cycles, tally.tokens, tally.drafted, tally.verified) == (3, 5, 0, 0)
    assert tally.seconds == pytest.approx(3.0 + 1.0 + 1.0)


def test_no_step_is_written_past_its_end() -> None:
    keen = recorded(CycleRecord(position=0, survival=(0.9,) * 5, accepted=5), tokens=3)
    tally = replay([keen], Contender(Fixed(5)), UNIT, agents=1, tokens_per_agent=3)
    assert (tally.cycles, tally.tokens, tally.verified) == (1, 3, 2)
    last = recorded(
        CycleRecord(position=0, survival=(), accepted=0),
        CycleRecord(position=1, survival=(0.9,), accepted=1),
        tokens=2,
    )
    # The last token needs no draft, so none is asked for.
    assert replay([last], Contender(Fixed(5)), UNIT, 1, 2).drafted == 0


def test_agents_share_the_passes() -> None:
    class Watching:
        def __init__(self) -> None:
            self.seen: list[tuple[int, int, int]] = []

        def verify_s(self, rows: int, requests: int, context: int) -> float:
            self.seen.append((rows, requests, context))
            return 1.0

        def draft_s(self, anchors: int) -> float:
            return 0.0

    cost = Watching()
    replay([STEP], Contender(Fixed(1)), cost, agents=3, tokens_per_agent=3)
    assert cost.seen[0] == (6, 3, 30)
    assert cost.seen[1] == (6, 3, 36)


def test_synthetic_records_are_calibrated_and_repeatable() -> None:
    steps = synthetic(seed=1, steps=40, tokens=100)
    assert steps == synthetic(seed=1, steps=40, tokens=100)
    assert steps != synthetic(seed=2, steps=40, tokens=100)
    for kind, means in CONDITIONAL.items():
        cycles = [cycle for step in steps if step.kind is kind for cycle in step.cycles]
        expected = 1.0
        for k, mean in enumerate(means):
            expected *= mean
            held = sum(cycle.accepted > k for cycle in cycles) / len(cycles)
            predicted = sum(cycle.survival[k] for cycle in cycles) / len(cycles)
            assert held == pytest.approx(expected, abs=0.04)
            assert predicted == pytest.approx(expected, abs=0.04)
    assert mean_survivals(steps)[StepKind.TEXT][0] == pytest.approx(0.755, abs=0.02)


def by_policy(results: Sequence[SimulatedPolicy], agents: int) -> dict[str, SimulatedPolicy]:
    return {each.policy: each for each in results if each.agents == agents}


def test_end_to_end_on_synthetic_records(tmp_path: Path) -> None:
    path = tmp_path / "cycles.jsonl"
    steps = synthetic(seed=3, steps=16, tokens=48)
    path.write_text("".join(step.model_dump_json() + "\n" for step in steps))
    assert read_records(path) == steps
    settings = SimulateSettings(
        curve="h200-like", records=path, agents=(1, 64, 256), tokens_per_agent=16
    )
    seen: list[tuple[int, int]] = []
    report = run_simulate(settings, on_replay=lambda done, total: seen.append((done, total)))
    assert report == run_simulate(settings)
    assert seen[-1] == (3 * len(POLICIES),) * 2
    assert "Not measured" in report.assumption
    for agents in (1, 64, 256):
        results = by_policy(report.results, agents)
        assert list(results) == list(POLICIES)
        plain = results["plain"]
        assert (plain.accepted_length, plain.verified, plain.drafted_share) == (1.0, 0.0, 0.0)
        assert plain.speedup == pytest.approx(1.0)
        for each in results.values():
            assert each.tok_per_s == pytest.approx(each.tok_per_s_per_agent * agents)
            assert each.tok_per_s == pytest.approx(agents * each.accepted_length / each.cycle_s)
        ours = results["step_aware"].tok_per_s
        assert ours > 0.97 * max(each.tok_per_s for each in results.values())
    # A tile of rows stops Algorithm 1, and whole blocks cost more than they bring.
    busy = by_policy(report.results, 256)
    assert busy["step_aware"].speedup > 1.1 * busy["fixed"].speedup
    assert busy["step_aware"].speedup > 1.25 * busy["prefix_throughput"].speedup
    assert busy["step_aware"].verified < 4 < busy["fixed"].verified


def test_a_drafter_that_never_pays_is_parked() -> None:
    hopeless = synthetic(0, 4, 24, {StepKind.TEXT: (0.05, 0.05)})
    _, cost = read_curve("two-core-cpu")
    ours = replay(hopeless, contender("step_aware", 2), cost, 16, 16)
    fixed = replay(hopeless, contender("fixed", 2), cost, 16, 16)
    assert ours.drafted == 0
    assert fixed.drafted > 0


def rates(cost: CycleCost, rows: Sequence[int]) -> list[float]:
    return [cost.verify_s(n, 1, 0) for n in rows]


def test_the_h200_like_curve_is_its_arithmetic() -> None:
    name, cost = read_curve("h200-like")
    assert name == "h200-like"
    assert isinstance(cost, RooflineCurve)
    floor = 3e-4 + 1.64e10 / 3.84e12
    assert rates(cost, [1, 64, 128]) == pytest.approx([floor] * 3)
    steep = 3e-4 + 1024 * 1.64e10 / 5.93e14
    assert rates(cost, [961, 1024]) == pytest.approx([steep] * 2)
    assert cost.verify_s(1, 1, 100_000) == pytest.approx(floor + 1e5 * 147456 / 3.84e12)
    assert cost.draft_s(0) == 0.0
    assert cost.draft_s(1) == pytest.approx(2e-4 + 2e9 / 3.84e12)
    assert cost.draft_s(512) == pytest.approx(2e-4 + 512 * 7 * 2e9 / 5.93e14)


def test_a_table_is_read_between_and_beyond_its_points() -> None:
    _, cost = read_curve("two-core-cpu")
    assert rates(cost, [1, 2, 3, 16, 24]) == pytest.approx([0.028, 0.031, 0.029, 0.043, 0.052])
    assert cost.verify_s(1, 9, 1000) == pytest.approx(0.03)
    assert [cost.draft_s(n) for n in (0, 1, 2, 3)] == pytest.approx([0, 0.0029, 0.00435, 0.0058])
    falling = UNIT.model_copy(update={"verify_s_at": (2.0, 1.0)})
    assert rates(falling, [1, 2, 50]) == [2.0, 1.0, 1.0]


LINE = STEP.model_dump(mode="json")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"cycles": [{"position": 1, "survival": [], "accepted": 0}]}, "start at 0"),
        ({"cycles": [{"position": 0, "survival": [0.1, 0.2], "accepted": 0}]}, "never rise"),
        ({"cycles": [{"position": 0, "survival": [0.1], "accepted": 2}]}, "cannot be accepted"),
        ({"cycles": [{"position": 0, "survival": [1.0], "accepted": 0, "free": 1}]}, "are free"),
        ({"tokens": 4}, "past the 4 tokens"),
        ({"kind": "poem"}, "kind"),
        ({"cycles": []}, "cycles"),
    ],
)
def test_records_that_cannot_be_are_told_by_line(
    change: dict[str, object], complaint: str, tmp_path: Path
) -> None:
    path = tmp_path / "cycles.jsonl"
    path.write_text(f"{json.dumps(LINE)}\n{json.dumps(LINE | change)}\n")
    with pytest.raises(BenchError, match=f"line 2.*{complaint}"):
        read_records(path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"kind": "measured"}, "kind"),
        ({"verify_s": [1.0]}, "differ in length"),
        ({"rows": [2, 2]}, "rows must ascend"),
        ({"verify_s": [0.0, 1.0]}, "verify_s"),
        ({"assumption": ""}, "assumption"),
    ],
)
def test_curves_that_cannot_be_are_refused(
    change: dict[str, object], complaint: str, tmp_path: Path
) -> None:
    path = tmp_path / "curve.json"
    path.write_text(json.dumps(UNIT.model_dump(by_alias=True) | change))
    with pytest.raises(BenchError, match=complaint):
        read_curve(str(path))


def test_mistakes_are_told() -> None:
    with pytest.raises(BenchError, match=r"none ships by that name \(h200-like, two-core-cpu\)"):
        read_curve("h300-like")
    with pytest.raises(BenchError, match="1 to 512"):
        SimulateSettings(curve="h200-like", agents=(513,))
    with pytest.raises(BudgetError, match="no policy 'wishful'"):
        run_simulate(SimulateSettings(curve="h200-like", policies=("wishful",)))
    with pytest.raises(BenchError, match="nothing to replay"):
        replay([], Contender(Fixed(1)), UNIT, 1, 1)
    with pytest.raises(BenchError, match="nothing to replay"):
        synthetic(0, 0, 10)
    with pytest.raises(BenchError, match="between 0 and 1"):
        synthetic(0, 1, 10, {StepKind.TEXT: (1.0,)})


def test_free_tokens_are_given_to_the_policy_as_such() -> None:
    seen: list[Candidate] = []

    class Spy:
        parks = False

        def lengths(self, candidates: Sequence[Candidate], cost: CycleCost) -> list[int]:
            seen.extend(candidates)
            return [each.certain for each in candidates]

    forced = recorded(CycleRecord(position=0, survival=(1.0, 0.5), accepted=2, free=1), tokens=5)
    replay([forced], Contender(Spy()), UNIT, 1, 1)
    assert seen[0] == Candidate((1.0, 0.5), context=10, cap=4, free=1, drafted=True)
