"""Sequential temperature scaling of the survivals (DSPARK.md, section 4), with an offset a slot."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dspark_backend.drafter.calibration import Calibration
from dspark_backend.training.cycles import Cycles, survivals
from dspark_backend.training.errors import TrainingError
from dspark_backend.training.statistics import calibration_error

# A coarse search over two decades, then a fine one around its best.
_COARSE = np.geomspace(0.1, 10.0, 81)
_FINE = np.geomspace(0.95, 1.05, 41)
_FARTHEST = 12.0  # offset: beyond it a slot is as good as always or never right
_HALVINGS = 24


def calibrate(cycles: Sequence[Cycles], block_size: int, data_set: str) -> Calibration:
    """Position by position, the temperature that minimises the calibration error of the cumulative
    survival, the earlier positions fixed.

    To each temperature belongs the offset with which the survivals come to as many drafts as stood:
    a temperature alone leaves a logit of 0 at one half, and can only make a head that is too sure
    everywhere unsure everywhere.

    Raises TrainingError without cycles.
    """
    if not cycles:
        raise TrainingError("no held-out cycles to calibrate on: hold more prompts out")
    logits = np.concatenate([each.confidence_logits for each in cycles])
    accepted = np.concatenate([each.accepted for each in cycles])
    offered = np.concatenate([each.offered for each in cycles])
    scalings: list[tuple[float, float]] = []
    before = np.ones(len(logits))
    for k in range(block_size):
        inside = offered > k
        slot = _Slot(before[inside], logits[inside, k], accepted[inside] > k)
        best = min(_COARSE, key=slot.error)
        temperature = float(min(best * _FINE, key=slot.error))
        scalings.append((temperature, slot.offset(temperature)))
        before = before * _sigmoid(logits[:, k] / temperature + scalings[k][1])
    found = Calibration(
        temperatures=tuple(round(temperature, 4) for temperature, _ in scalings),
        offsets=tuple(round(offset, 4) for _, offset in scalings),
        data_set=data_set,
        samples=len(accepted),
    )
    return found.model_copy(
        update={
            "ece_before": _errors(cycles, Calibration.identity(block_size)),
            "ece_after": _errors(cycles, found),
        }
    )


class _Slot:
    """A slot's logits, the survival of the slots before it, and which cumulative prefix stood."""

    def __init__(
        self, before: NDArray[np.float64], logits: NDArray[np.float64], stood: NDArray[np.bool_]
    ) -> None:
        self._before, self._logits, self._stood = before, logits, stood

    def survival(self, temperature: float, offset: float) -> NDArray[np.float64]:
        return self._before * _sigmoid(self._logits / temperature + offset)

    def offset(self, temperature: float) -> float:
        """By bisection, since the mean survival rises with it."""
        low, high, rate = -_FARTHEST, _FARTHEST, float(self._stood.sum())
        for _ in range(_HALVINGS):
            middle = 0.5 * (low + high)
            if self.survival(temperature, middle).sum() < rate:
                low = middle
            else:
                high = middle
        return 0.5 * (low + high)

    def error(self, temperature: float) -> float:
        return calibration_error(self.survival(temperature, self.offset(temperature)), self._stood)


def _errors(cycles: Sequence[Cycles], calibration: Calibration) -> tuple[float, ...]:
    return tuple(round(calibration_error(p, y), 5) for p, y in survivals(cycles, calibration))


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * x)))
