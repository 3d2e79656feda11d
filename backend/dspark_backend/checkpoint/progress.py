"""How long work on model files reports that it moves on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum


class Stage(StrEnum):
    """What is being done to a model's files."""

    FETCH = "fetch"
    CONVERT = "convert"
    QUANTISE = "quantise"


@dataclass(frozen=True, slots=True)
class Progress:
    """One report: ``done_bytes`` of ``total_bytes`` (0 when unknown) of one stage of one model.

    ``total_bytes`` counts the source file while fetching, the written tensors while converting.
    """

    model: str
    stage: Stage
    done_bytes: int
    total_bytes: int


ProgressSink = Callable[[Progress], None]
"""Called from the thread that does the work; whatever it raises ends that work."""
