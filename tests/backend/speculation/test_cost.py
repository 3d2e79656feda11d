"""The cost model's maths on curves that are known: interpolation, drift, outliers; and its file."""

from __future__ import annotations

import json
import logging
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dspark_backend.catalog.home import HOME_VARIABLE
from dspark_backend.errors import RequestError
from dspark_backend.speculation.cost import CostModel
from dspark_backend.speculation.cost_store import (
    check_conditions,
    conditions_here,
    cost_file,
    keep,
    read_kept,
)
from dspark_backend.speculation.cost_table import Conditions, CostTable

ROWS = (1, 2, 4, 8, 16, 32)
# Jagged on purpose: four rows are cheaper than three would be, eight start another tile.
SECONDS = (0.020, 0.024, 0.023, 0.035, 0.040, 0.072)
HERE = Conditions(
    cpu="a processor",
    cpu_flags=("avx2",),
    cores=2,
    threads=2,
    software="dspark-agent 1",
    model="5ha",
    precision="int8",
    drafter="d5ha",
)


def table(**fields: Any) -> CostTable:
    known: dict[str, Any] = {"rows": ROWS, "verify_s": SECONDS, "context": 100}
    return CostTable(**(known | {"anchors": (1, 4), "draft_s": (0.005, 0.011)} | fields))


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    return tmp_path


# -- predictions -------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", range(1, 33))
def test_rows_are_interpolated_between_what_was_measured(rows: int) -> None:
    expected = float(np.interp(rows, ROWS, SECONDS))
    assert CostModel(table()).verify_s(rows, 1, 100) == pytest.approx(expected, rel=1e-12)


def test_past_the_table_the_last_slope_goes_on() -> None:
    slope = (SECONDS[-1] - SECONDS[-2]) / 16
    assert CostModel(table()).verify_s(132, 1, 100) == pytest.approx(0.072 + 100 * slope)
    assert CostModel(table()).draft_s(8) == pytest.approx(0.011 + 4 * 0.002)


@pytest.mark.parametrize("last", [0.040, 0.031], ids=["flat", "falling"])
def test_rows_past_a_noisy_end_are_not_free(last: float) -> None:
    model = CostModel(table(verify_s=(*SECONDS[:-1], last)))
    assert model.verify_s(64, 1, 100) == pytest.approx(2 * last)


def test_a_table_of_one_point_grows_in_proportion() -> None:
    model = CostModel(CostTable(rows=(1,), verify_s=(0.01,)))
    assert model.verify_s(3, 1, 0) == pytest.approx(0.03)


def test_requests_and_context_are_paid_for_beside_the_rows() -> None:
    model = CostModel(table(request_s=1e-3, position_s=1e-6, pair_s=2e-6))
    base = model.verify_s(8, 1, 100)
    assert base == pytest.approx(0.035)
    # Four sequences of 300 positions, two rows each: 1100 more positions, 1600 more pairs.
    expected = base + 3e-3 + 1100e-6 + 1600 * 2e-6
    assert model.verify_s(8, 4, 1200) == pytest.approx(expected)


def test_an_empty_context_is_cheaper_but_never_free() -> None:
    model = CostModel(table(position_s=1e-6))
    assert model.verify_s(1, 1, 0) == pytest.approx(0.020 - 1e-4)
    assert CostModel(table(position_s=1.0)).verify_s(1, 1, 0) == pytest.approx(0.010)


def test_without_a_drafter_drafts_cost_nothing() -> None:
    model = CostModel(table(anchors=(), draft_s=()))
    model.observe(1, 1, 100, 0, 0.02, 0.0)
    assert model.draft_s(3) == 0.0
    assert CostModel(table()).draft_s(0) == 0.0


@pytest.mark.parametrize("arguments", [(0, 0, 5), (1, 2, 5), (4, 0, 5), (4, 1, -1)])
def test_a_pass_that_cannot_be_is_refused(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="no pass has"):
        CostModel(table()).verify_s(*arguments)
    with pytest.raises(ValueError, match="anchors"):
        CostModel(table()).draft_s(-1)


# -- following the machine ---------------------------------------------------------------------


def cycles(
    model: CostModel, count: int, verify: float, draft: float = 1.0, *, seed: int = 0
) -> None:
    """``count`` cycles on a machine at ``verify`` times the table's seconds, with 5 % noise."""
    noise, truth = random.Random(seed), CostModel(model.table)
    for _ in range(count):
        rows, anchors = noise.choice([1, 3, 6, 12, 24]), noise.choice([1, 2, 3])
        jitter = math.exp(noise.gauss(0.0, 0.05))
        model.observe(
            rows, 1, 100, anchors, truth.verify_s(rows, 1, 100) * verify * jitter,
            truth.draft_s(anchors) * draft * jitter,
        )  # fmt: skip


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.3, 3.0])
def test_predictions_follow_a_machine_that_changed(factor: float) -> None:
    model, truth = CostModel(table()), CostModel(table())
    cycles(model, 200, factor, 2.0)
    for rows in (1, 2, 5, 12, 24):
        wanted = factor * truth.verify_s(rows, 1, 100)
        assert model.verify_s(rows, 1, 100) == pytest.approx(wanted, rel=0.1)
    assert model.draft_s(2) == pytest.approx(2.0 * truth.draft_s(2), rel=0.1)


def test_row_counts_never_seen_move_with_the_machine() -> None:
    model = CostModel(table())
    for _ in range(100):
        model.observe(1, 1, 100, 0, 2 * 0.020, 0.0)
    assert 1.2 * 0.072 < model.verify_s(32, 1, 100) < 2 * 0.072


def test_a_point_that_was_measured_wrongly_is_corrected_by_itself() -> None:
    model = CostModel(table(verify_s=(*SECONDS[:3], 2 * SECONDS[3], *SECONDS[4:])))
    noise, truth = random.Random(3), CostModel(table())
    for _ in range(1500):
        rows = noise.choice(ROWS)
        model.observe(rows, 1, 100, 0, truth.verify_s(rows, 1, 100), 0.0)
    for rows in ROWS:
        assert model.verify_s(rows, 1, 100) == pytest.approx(truth.verify_s(rows, 1, 100), rel=0.05)


def test_one_pass_that_took_ten_times_as_long_is_no_drift() -> None:
    model = CostModel(table())
    cycles(model, 100, 1.0)
    before = model.verify_s(4, 1, 100)
    model.observe(4, 1, 100, 1, 10 * before, 10 * model.draft_s(1))
    assert model.verify_s(4, 1, 100) == pytest.approx(before, rel=0.05)


def test_one_pass_in_ten_that_hiccups_leaves_the_usual_cost() -> None:
    model, truth = CostModel(table()), CostModel(table())
    for number in range(2000):
        slow = 10.0 if number % 10 == 0 else 1.0
        model.observe(4, 1, 100, 0, slow * truth.verify_s(4, 1, 100), 0.0)
    assert model.verify_s(4, 1, 100) == pytest.approx(truth.verify_s(4, 1, 100), rel=0.1)
    assert model.median_error is not None
    assert model.median_error < 0.15


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 300),
            st.integers(0, 20),
            st.floats(allow_nan=True, allow_infinity=True),
            st.floats(1e-12, 1e12),
        ),
        max_size=60,
    )
)
def test_whatever_the_clock_says_costs_stay_positive_and_finite(
    seen: list[tuple[int, int, float, float]],
) -> None:
    model = CostModel(table(request_s=1e-3, position_s=1e-7, pair_s=1e-7))
    for rows, anchors, verify_s, draft_s in seen:
        model.observe(rows, 1, 10 * rows, anchors, verify_s, draft_s)
    costs = [model.verify_s(rows, 1, 500) for rows in range(1, 100)]
    costs += [model.draft_s(anchors) for anchors in range(1, 20)]
    assert all(math.isfinite(cost) and cost > 0.0 for cost in costs)


@pytest.mark.parametrize("nonsense", [0.0, -1.0, math.nan, math.inf])
def test_a_time_that_no_clock_measured_teaches_nothing(nonsense: float) -> None:
    model = CostModel(table())
    for _ in range(50):
        model.observe(4, 1, 100, 1, nonsense, nonsense)
    assert model.verify_s(4, 1, 100) == 0.023
    assert model.draft_s(1) == 0.005
    assert model.median_error is None


def test_the_error_is_of_predictions_made_before_the_pass() -> None:
    model = CostModel(table())
    model.observe(1, 1, 100, 0, 0.040, 0.0)
    assert model.median_error == pytest.approx(0.5)


def test_a_disturbed_measurement_is_seen_and_its_spikes_are_left_out() -> None:
    calm = table(verify_s=tuple(sorted(SECONDS)))
    assert not calm.disturbed
    assert calm.undisturbed() == calm
    times = list(calm.verify_s)
    times[1] *= 5
    spiky = calm.model_copy(update={"verify_s": tuple(times)})
    assert spiky.disturbed
    mended = spiky.undisturbed()
    assert not mended.disturbed
    assert mended.verify_s[1] == calm.verify_s[2]
    assert mended.verify_s[2:] == calm.verify_s[2:]


def test_only_a_lasting_change_makes_the_table_stale() -> None:
    model = CostModel(table())
    cycles(model, 1000, 1.1)
    assert not model.drifted
    cycles(model, 20, 2.0)
    fresh = CostModel(table())
    cycles(fresh, 40, 2.0)
    assert not fresh.drifted
    cycles(fresh, 1000, 2.0)
    assert fresh.drifted


# -- the table and its file --------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"rows": (1, 2, 2, 8, 16, 32)},
        {"rows": (0, 2, 4, 8, 16, 32)},
        {"rows": ()},
        {"verify_s": SECONDS[:-1]},
        {"verify_s": (0.0, *SECONDS[1:])},
        {"verify_s": (math.nan, *SECONDS[1:])},
        {"verify_s": (*SECONDS[:-1], math.inf)},
        {"request_s": -1e-3},
        {"anchors": (1, 2, 4)},
        {"schema_version": 1},
        {"surprise": 1},
    ],
)
def test_a_table_that_makes_no_sense_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        table(**fields)


def test_what_was_kept_is_read_back(cache: Path) -> None:
    assert read_kept(HERE) is None
    kept = table(conditions=HERE, request_s=1e-3, position_s=1e-7)
    keep(kept)
    assert read_kept(HERE) == kept
    assert cost_file(HERE).is_relative_to(cache / "cost" / "5ha")
    assert [path.name for path in cost_file(HERE).parent.iterdir()] == [cost_file(HERE).name]


@pytest.mark.parametrize("field", Conditions.model_fields)
def test_a_table_of_other_conditions_is_not_found_and_not_used(
    field: str, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values: dict[str, Any] = {"cores": 8, "threads": 1, "cpu_flags": (), "drafter": None}
    other = HERE.model_copy(update={field: values.get(field, "another")})
    keep(table(conditions=HERE))
    assert read_kept(other) is None
    # Somebody copies the file to where the other machine looks for its own.
    cost_file(other).parent.mkdir(parents=True, exist_ok=True)
    cost_file(other).write_bytes(cost_file(HERE).read_bytes())
    with caplog.at_level(logging.WARNING):
        assert read_kept(other) is None
    assert field in caplog.text
    with pytest.raises(RequestError, match=field):
        check_conditions(table(conditions=HERE), other)


def test_a_curve_without_conditions_is_taken_at_its_word(cache: Path) -> None:
    check_conditions(table(), HERE)
    with pytest.raises(ValueError, match="not kept"):
        keep(table())


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", "not json", "cut", "negative", "version", "bare"]
)
def test_a_damaged_file_is_no_table(
    damage: str, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keep(table(conditions=HERE))
    path = cost_file(HERE)
    document = json.loads(path.read_text())
    match damage:
        case "cut":
            text = path.read_text()[:-40]
        case "negative":
            text = json.dumps(document | {"verify_s": [-1.0] * len(ROWS)})
        case "version":
            text = json.dumps(document | {"schema_version": 99})
        case "bare":
            text = json.dumps(document | {"conditions": None})
        case _:
            text = damage
    path.write_text(text)
    with caplog.at_level(logging.WARNING):
        assert read_kept(HERE) is None
    assert path.name in caplog.text


def test_a_cache_that_cannot_be_written_to_is_only_logged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("a file where the cache folder should be")
    monkeypatch.setenv(HOME_VARIABLE, str(blocked))
    with caplog.at_level(logging.WARNING):
        keep(table(conditions=HERE))
    assert "cannot be kept" in caplog.text
    assert read_kept(HERE) is None


def test_a_write_that_fails_leaves_the_table_that_was_there(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    keep(table(conditions=HERE))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with caplog.at_level(logging.WARNING):
        keep(table(conditions=HERE, request_s=1.0))
    assert "No space left" in caplog.text
    assert read_kept(HERE) == table(conditions=HERE)
    assert len(list(cost_file(HERE).parent.iterdir())) == 1


def test_this_machine_has_conditions() -> None:
    here = conditions_here("sha", "int8", 2)
    assert here == conditions_here("sha", "int8", 2)
    assert here != conditions_here("sha", "int8", 1)
    assert here.cores >= 1
    assert "torch" in here.software
    assert "unknown" not in here.software
