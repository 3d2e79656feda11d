"""How good a drafter is on held-out rollouts: accepted length, acceptance, confidence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from pydantic import BaseModel, ConfigDict

from dspark_backend.drafter.calibration import Calibration
from dspark_backend.drafter.model import DraftModel
from dspark_backend.training.cycles import (
    Cycles,
    accepted_length,
    conditional_acceptance,
    replay,
    survivals,
)
from dspark_backend.training.features import FeatureSource
from dspark_backend.training.rollout import Rollout
from dspark_backend.training.statistics import calibration_error, ranking, reliability


class Figures(BaseModel):
    """Of one set of rollouts. ``accepted_length`` counts the correction or bonus token;
    ``acceptance`` [g] is conditional on the slots before; ``auc`` ranks slot k's cumulative
    survival; ``ece_*`` are its calibration errors."""

    model_config = ConfigDict(frozen=True)

    rollouts: int
    tokens: int
    cycles: int
    accepted_length: float
    acceptance: tuple[float, ...]
    auc: tuple[float, ...]
    ece_before: tuple[float, ...]
    ece_after: tuple[float, ...]


class Evaluation(BaseModel):
    """All rollouts together, by source and by step kind; ``reliability`` [g] holds, per slot, the
    bins of the calibrated cumulative survival: mean prediction, observed share, samples."""

    model_config = ConfigDict(frozen=True)

    overall: Figures
    by_source: dict[str, Figures]
    by_kind: dict[str, Figures]
    reliability: tuple[tuple[tuple[float, float, int], ...], ...]


def replay_all(
    model: DraftModel,
    source: FeatureSource,
    rollouts: Iterable[Rollout],
    d2t: torch.Tensor | None,
    on_done: Callable[[int], None] | None = None,
) -> list[Cycles]:
    """The cycles of every rollout that has any; ``on_done`` with the count after each."""
    done = []
    for count, rollout in enumerate(rollouts, start=1):
        cycles = replay(model, source.example(rollout), d2t)
        if cycles is not None:
            done.append(cycles)
        if on_done is not None:
            on_done(count)
    return done


def evaluate(cycles: Sequence[Cycles], calibration: Calibration) -> Evaluation:
    """The figures of ``cycles`` with and without ``calibration``."""
    bins = survivals(cycles, calibration)
    return Evaluation(
        overall=_figures(cycles, calibration),
        by_source={
            name: _figures([c for c in cycles if c.source == name], calibration)
            for name in sorted({c.source for c in cycles})
        },
        by_kind={
            name: _figures([c for c in cycles if c.kind == name], calibration)
            for name in sorted({c.kind for c in cycles})
        },
        reliability=tuple(tuple(reliability(p, y)) for p, y in bins),
    )


def _figures(cycles: Sequence[Cycles], calibration: Calibration) -> Figures:
    slots = len(calibration.temperatures)
    before = survivals(cycles, Calibration.identity(slots))
    after = survivals(cycles, calibration)
    return Figures(
        rollouts=len(cycles),
        tokens=sum(each.tokens for each in cycles),
        cycles=sum(len(each.accepted) for each in cycles),
        accepted_length=accepted_length(cycles),
        acceptance=tuple(conditional_acceptance(cycles, slots)),
        auc=tuple(ranking(p, y) for p, y in after),
        ece_before=tuple(calibration_error(p, y) for p, y in before),
        ece_after=tuple(calibration_error(p, y) for p, y in after),
    )
