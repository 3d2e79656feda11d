"""Sequential temperature scaling of the survivals (DSPARK.md, section 4)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dspark_backend.drafter.calibration import Calibration
from dspark_backend.training.cycles import Cycles, sigmoid, survivals
from dspark_backend.training.errors import TrainingError
from dspark_backend.training.statistics import calibration_error

# A coarse search over two decades, then a fine one around its best.
_COARSE = np.geomspace(0.1, 10.0, 81)
_FINE = np.geomspace(0.95, 1.05, 41)


def calibrate(cycles: Sequence[Cycles], block_size: int, data_set: str) -> Calibration:
    """Position by position, the temperature that minimises the calibration error of the cumulative
    survival, the earlier positions fixed.

    Raises TrainingError without cycles.
    """
    if not cycles:
        raise TrainingError("no held-out cycles to calibrate on: hold more prompts out")
    temperatures = [1.0] * block_size
    before = [calibration_error(p, y) for p, y in survivals(cycles, temperatures)]
    for k in range(block_size):
        best = min(_COARSE, key=lambda t: _error_at(cycles, temperatures, k, float(t)))
        fine = min(best * _FINE, key=lambda t: _error_at(cycles, temperatures, k, float(t)))
        temperatures[k] = float(fine)
    after = [calibration_error(p, y) for p, y in survivals(cycles, temperatures)]
    return Calibration(
        temperatures=tuple(round(t, 4) for t in temperatures),
        data_set=data_set,
        samples=sum(len(each.accepted) for each in cycles),
        ece_before=tuple(round(e, 5) for e in before),
        ece_after=tuple(round(e, 5) for e in after),
    )


def _error_at(
    cycles: Sequence[Cycles], temperatures: Sequence[float], k: int, temperature: float
) -> float:
    logits = np.concatenate([each.confidence_logits for each in cycles])
    accepted = np.concatenate([each.accepted for each in cycles])
    inside = np.concatenate([each.offered for each in cycles]) > k
    survival = np.ones(int(inside.sum()))
    for j in range(k):
        survival = survival * sigmoid(logits[inside, j] / temperatures[j])
    survival = survival * sigmoid(logits[inside, k] / temperature)
    return calibration_error(survival, accepted[inside] > k)
