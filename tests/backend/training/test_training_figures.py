"""Replayed cycles, calibration and figures are what brute force says they are."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from dspark_backend.drafter.calibration import Calibration
from dspark_backend.drafter.model import DraftModel
from dspark_backend.request import StepKind
from dspark_backend.training.calibrate import calibrate
from dspark_backend.training.cycles import (
    Cycles,
    accepted_length,
    conditional_acceptance,
    draft_everywhere,
    replay,
    survivals,
)
from dspark_backend.training.errors import TrainingError
from dspark_backend.training.evaluate import evaluate, replay_all
from dspark_backend.training.features import DecoderFeatures
from dspark_backend.training.rollout import Rollout
from dspark_backend.training.statistics import calibration_error, ranking, reliability


def cycles_of(accepted: list[int], offered: list[int], logits: np.ndarray | None = None) -> Cycles:
    rows = np.zeros((len(accepted), 3)) if logits is None else logits
    tokens = sum(accepted) + len(accepted)
    return Cycles("code", "text", tokens, np.array(accepted), np.array(offered), rows)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def invented(count: int, sharpness: float, seed: int = 0, shift: float = 0.0) -> Cycles:
    """Cycles whose drafts survive with known probabilities; logits are ``sharpness`` times those of
    the probabilities after ``shift``."""
    rng = np.random.default_rng(seed)
    true = rng.normal(0.5, 1.5, (count, 3))
    stood = rng.random((count, 3)) < sigmoid(true)
    accepted = np.cumprod(stood, axis=1).sum(axis=1)
    logits = (true + shift) * sharpness
    return Cycles("code", "text", int(accepted.sum()) + count, accepted, np.full(count, 3), logits)


@pytest.mark.parametrize("reduced", [False, True])
def test_drafting_everywhere_at_once_is_drafting_one_by_one(
    reduced: bool,
    draft_model: Callable[..., DraftModel],
    decoder_features: Callable[..., DecoderFeatures],
    rollouts: list[Rollout],
) -> None:
    d2t = torch.arange(0, 512, 2) if reduced else None
    model = draft_model("rnn", d2t)
    example = decoder_features(d2t).example(rollouts[11])
    drafts, logits = draft_everywhere(model, example, d2t)
    for row in (0, 7, 29):
        at = example.first + row
        features = example.features[None, :at].float()
        token = example.tokens[at][None]
        with torch.no_grad():
            hidden = model.hidden(features, token[None], torch.tensor([[at]]))[:, 0]
        tokens, sure = model.chain(hidden, token, d2t)
        assert drafts[row].tolist() == tokens[0].tolist()
        np.testing.assert_allclose(logits[row], sure[0].numpy(), atol=1e-4)


def test_replay_walks_as_decoding_would(
    draft_model: Callable[..., DraftModel],
    decoder_features: Callable[..., DecoderFeatures],
    rollouts: list[Rollout],
) -> None:
    """Of a rollout that the drafter's own drafts were written into: whole blocks stand there."""
    model, source, plain = draft_model(), decoder_features(), rollouts[10]
    drafts, _ = draft_everywhere(model, source.example(plain), None)
    answer = (*plain.answer[:1], *drafts[0].tolist(), *plain.answer[5:])
    example = source.example(Rollout("k", "s", plain.kind, plain.prompt, answer))
    again, _ = draft_everywhere(model, example, None)
    cycles = replay(model, example, None)
    assert cycles is not None
    assert cycles.accepted[0] >= 4
    assert cycles.tokens == len(answer) - 1
    # Brute force: one token after the other.
    at, seen = 0, []
    while at + 1 < len(answer):
        follows = answer[at + 1 : at + 5]
        stood = 0
        while stood < len(follows) and again[at][stood] == follows[stood]:
            stood += 1
        seen.append((stood, len(follows)))
        at += stood + 1
    assert list(zip(cycles.accepted, cycles.offered, strict=True)) == seen


def test_accepted_length_counts_the_bonus_and_acceptance_is_conditional() -> None:
    cycles = [cycles_of([3, 0, 1], [3, 3, 3]), cycles_of([2], [2])]
    assert accepted_length(cycles) == pytest.approx((4 + 1 + 2 + 3) / 4)
    assert conditional_acceptance(cycles, 3) == pytest.approx([3 / 4, 2 / 3, 1 / 1])
    assert accepted_length([]) == 0.0


def test_survivals_are_cumulative_and_only_of_slots_inside_the_answer() -> None:
    logits = np.array([[0.0, 2.0, 4.0], [1.0, 1.0, 1.0]])
    calibrated = Calibration(
        temperatures=(1.0, 2.0, 4.0), offsets=(0.0, 0.5, 0.0), data_set="d", samples=1
    )
    pairs = survivals([cycles_of([1, 2], [3, 2], logits)], calibrated)
    assert [len(p) for p, _ in pairs] == [2, 2, 1]
    np.testing.assert_allclose(pairs[1][0], sigmoid(logits[:, 0]) * sigmoid(logits[:, 1] / 2 + 0.5))
    assert pairs[0][1].tolist() == [True, True]
    assert pairs[1][1].tolist() == [False, True]
    assert pairs[2][1].tolist() == [False]


@pytest.mark.parametrize("sharpness", [0.4, 2.5])
def test_calibration_finds_the_temperature_that_was_put_in(sharpness: float) -> None:
    calibration = calibrate([invented(20_000, sharpness)], 3, "invented")
    assert calibration.temperatures == pytest.approx([sharpness] * 3, rel=0.15)
    assert calibration.offsets == pytest.approx([0.0] * 3, abs=0.1)
    assert min(calibration.ece_before) > 0.04
    assert max(calibration.ece_after) < 0.015
    assert calibration.samples == 20_000
    fresh = evaluate([invented(20_000, sharpness, seed=1)], calibration)
    assert max(fresh.overall.ece_after) < 0.02 < min(fresh.overall.ece_before)


def test_a_head_that_is_too_sure_everywhere_is_shifted_and_not_flattened() -> None:
    """Half of the answers are wrong and the logits say so, but for a constant."""
    calibration = calibrate([invented(20_000, 1.0, shift=1.5)], 3, "invented")
    assert calibration.temperatures == pytest.approx([1.0] * 3, rel=0.15)
    assert calibration.offsets == pytest.approx([-1.5] * 3, abs=0.2)
    fresh = evaluate([invented(20_000, 1.0, seed=1, shift=1.5)], calibration)
    assert max(fresh.overall.ece_after) < 0.02 < 0.05 < min(fresh.overall.ece_before)


def test_calibration_wants_cycles() -> None:
    with pytest.raises(TrainingError, match="held-out"):
        calibrate([], 3, "nothing")


def test_calibration_error_and_reliability_against_counting() -> None:
    predicted = np.array([0.1, 0.12, 0.9, 0.95, 1.0])
    happened = np.array([False, True, True, True, False])
    # Ten bins: {.1, .12}, {.9, .95, 1.0}.
    expected = (2 * abs(0.11 - 0.5) + 3 * abs(0.95 - 2 / 3)) / 5
    assert calibration_error(predicted, happened, bins=10) == pytest.approx(expected)
    assert reliability(predicted, happened, bins=10) == [
        (pytest.approx(0.11), 0.5, 2),
        (pytest.approx(0.95), pytest.approx(2 / 3), 3),
    ]
    assert calibration_error(predicted[:0], happened[:0]) == 0.0


def test_ranking_against_all_pairs() -> None:
    rng = np.random.default_rng(0)
    predicted = rng.integers(0, 10, 200) / 10
    happened = rng.random(200) < predicted
    pairs = [(a > b) + 0.5 * (a == b) for a in predicted[happened] for b in predicted[~happened]]
    assert ranking(predicted, happened) == pytest.approx(float(np.mean(pairs)))
    assert ranking(predicted, np.ones(200, np.bool_)) == 0.5


def test_figures_are_by_source_and_by_kind(
    draft_model: Callable[..., DraftModel],
    decoder_features: Callable[..., DecoderFeatures],
    rollouts: list[Rollout],
) -> None:
    first = rollouts[0]
    call = Rollout("c", "tools", StepKind.TOOL_CALL, first.prompt, first.answer)
    short = Rollout("d", "tools", StepKind.TOOL_CALL, first.prompt, first.answer[:1])
    model = draft_model("none")
    seen: list[int] = []
    cycles = replay_all(
        model, decoder_features(), [first, rollouts[1], call, short], None, seen.append
    )
    assert seen == [1, 2, 3, 4]
    calibration = calibrate(cycles, 4, "d")
    evaluation = evaluate(cycles, calibration)
    assert evaluation.overall.rollouts == 3
    assert set(evaluation.by_source) == {"counting", "tools"}
    assert evaluation.by_kind["tool_call"].rollouts == 1
    assert len(evaluation.reliability) == 4
    assert evaluation.overall.accepted_length >= 1.0
