"""Calibrated survival: a temperature and an offset a position (DSPARK.md, sections 3 and 4)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dspark_backend.errors import ModelFormatError

FILE = "calibration.json"


class Calibration(BaseModel):
    """``calibration.json``.

    ``temperatures[k]`` divides the confidence logit of slot k + 1, ``offsets[k]`` is added to what
    comes of it (0 where there are none): the head learns how much of the target's distribution a
    draft covers anywhere in a text, and what counts is whether it stands, at the places where
    decoding stops.
    ``ece_before`` and ``ece_after`` are the expected calibration errors of the cumulative survival
    at each position, over ``samples`` blocks of ``data_set``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperatures: tuple[float, ...] = Field(min_length=1)
    offsets: tuple[float, ...] = ()
    data_set: str
    samples: int = Field(ge=0)
    ece_before: tuple[float, ...] = ()
    ece_after: tuple[float, ...] = ()

    @classmethod
    def identity(cls, block_size: int) -> Calibration:
        """No correction: what holds until held-out data was looked at."""
        return cls(temperatures=(1.0,) * block_size, data_set="none", samples=0)

    @classmethod
    def read(cls, folder: Path, block_size: int) -> Calibration:
        """That of a drafter's folder; :meth:`identity` where it has none.

        Raises ModelFormatError for a damaged file or one for blocks of another size.
        """
        path = folder / FILE
        if not path.exists():
            return cls.identity(block_size)
        try:
            read = cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise ModelFormatError(
                f"{path} is no calibration ({error}): calibrate the drafter again, or remove the "
                "file to go without"
            ) from error
        values = read.temperatures
        if len(values) != block_size or not all(0 < value < 1e3 for value in values):
            raise ModelFormatError(
                f"{path}: {len(values)} temperatures {values} for a block of {block_size}: "
                "they must be positive, one a slot; calibrate the drafter again"
            )
        if read.offsets and (
            len(read.offsets) != block_size or not np.isfinite(read.offsets).all()
        ):
            raise ModelFormatError(
                f"{path}: {len(read.offsets)} offsets {read.offsets} for a block of {block_size}: "
                "they must be finite, one a slot, or none; calibrate the drafter again"
            )
        return read

    def write(self, folder: Path) -> None:
        (folder / FILE).write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    def confidence(self, slot: int, logits: NDArray[np.float64]) -> NDArray[np.float64]:
        """What the confidence head's ``logits`` [N] at ``slot`` (from 0) come to, in [0, 1]."""
        offset = self.offsets[slot] if self.offsets else 0.0
        scaled = logits / self.temperatures[slot] + offset
        return np.asarray(0.5 * (1 + np.tanh(0.5 * scaled)))
