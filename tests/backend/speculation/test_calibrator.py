"""Survivals follow what is accepted, bucket by bucket, without looking at what is to be judged."""

from __future__ import annotations

import random

import pytest

from dspark_backend.request import StepKind
from dspark_backend.speculation.calibrator import MaskWidth, SurvivalCalibrator, conditionals

TEXT, CALL = StepKind.TEXT, StepKind.TOOL_CALL


def error(calibrator: SurvivalCalibrator, kind: StepKind, truth: float, said: float) -> float:
    return abs(calibrator.survival(kind, (said,), ())[0] - truth)


@pytest.mark.parametrize(("truth", "said"), [(0.9, 0.6), (0.3, 0.8), (0.05, 0.5), (0.7, 0.7)])
def test_a_wrong_confidence_is_corrected_by_experience(truth: float, said: float) -> None:
    rng = random.Random(0)
    calibrator = SurvivalCalibrator()
    for _ in range(2000):
        calibrator.observe(TEXT, (said,), (), int(rng.random() < truth))
    assert error(calibrator, TEXT, truth, said) < 0.05
    assert calibrator.survival(CALL, (said,), ()) == (said,)  # other kinds have learned nothing
    assert calibrator.survival(TEXT, (said,), (5,)) == (said,)  # nor have other widths


def test_confidences_that_were_right_stay_right_over_their_whole_range() -> None:
    rng = random.Random(1)
    calibrator = SurvivalCalibrator()
    for _ in range(5000):
        said = rng.random()
        calibrator.observe(TEXT, (said,), (), int(rng.random() < said))
    assert max(error(calibrator, TEXT, p / 10, p / 10) for p in range(1, 10)) < 0.06


def test_it_follows_a_drift() -> None:
    rng = random.Random(2)
    calibrator = SurvivalCalibrator()
    for truth in (0.9, 0.4):
        for _ in range(3000):
            calibrator.observe(TEXT, (0.7,), (), int(rng.random() < truth))
        assert error(calibrator, TEXT, truth, 0.7) < 0.08


def test_only_tokens_that_were_judged_teach() -> None:
    """Behind the first rejected token nothing is known, whatever the survivals there."""
    one, other = SurvivalCalibrator(), SurvivalCalibrator()
    one.observe(TEXT, (0.8, 0.4, 0.3), (2, 3, 2000), 1)
    other.observe(TEXT, (0.8, 0.4, 0.1), (2, 3, 5), 1)
    probe = (0.9, 0.5, 0.2)
    assert one.survival(TEXT, probe, (2, 3, 5)) == other.survival(TEXT, probe, (2, 3, 5))
    assert one.survival(TEXT, probe, (0, 0, 0)) == pytest.approx(probe)


def test_survival_k_does_not_depend_on_later_confidences() -> None:
    calibrator = SurvivalCalibrator()
    calibrator.observe(TEXT, (0.6, 0.3), (), 1)
    one, other = (calibrator.survival(TEXT, (0.6, last), ()) for last in (0.59, 0.01))
    assert one[0] == other[0]


def test_forced_tokens_are_certain_whatever_was_seen() -> None:
    calibrator = SurvivalCalibrator()
    for _ in range(200):
        calibrator.observe(CALL, (0.5, 0.5, 0.25), (40, 1, 40), 0)
    said = calibrator.survival(CALL, (1.0, 0.5, 0.5), (1, 40, 1))
    assert said[0] == 1.0
    assert said[1] == said[2] < 0.2
    assert list(said) == sorted(said, reverse=True)


@pytest.mark.parametrize("said", [0.0, 1e-12, 1.0 - 1e-12, 1.0])
def test_extremes_stay_probabilities(said: float) -> None:
    calibrator = SurvivalCalibrator()
    for accepted in (0, 1) * 50:
        calibrator.observe(TEXT, (said,), (), accepted)
    assert 0.0 <= calibrator.survival(TEXT, (said,), ())[0] <= 1.0


def test_conditionals_undo_the_running_product() -> None:
    assert conditionals((0.5, 0.25, 0.25)) == [0.5, 0.5, 1.0]
    assert conditionals((0.5, 0.0, 0.0)) == [0.5, 0.0, 0.0]


@pytest.mark.parametrize(
    ("width", "bucket"), [(0, "FREE"), (1, "ONE"), (2, "FEW"), (33, "SOME"), (152_000, "MANY")]
)
def test_widths_have_buckets(width: int, bucket: str) -> None:
    assert MaskWidth.of(width) is MaskWidth[bucket]
