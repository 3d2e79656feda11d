"""Cost curves from a file: what a pass and a draft take on a machine that is not at hand.

Two kinds, each an object with an ``assumption`` that says in words where its figures come from:

    {"kind": "table", "assumption": "...", "rows": [1, 2, ...], "verify_s": [0.02, 0.021, ...],
     "per_request_s": 0.0, "per_position_s": 0.0, "anchors": [1, 2, ...], "draft_s": [0.003, ...]}

holds seconds, interpolated linearly and extrapolated by the last slope (never a falling one);
every request beyond the first and every position of context come on top.

    {"kind": "roofline", "assumption": "...", "bytes_per_s": 3.8e12, "flop_per_s": 5.9e14,
     "tile_rows": 64, "kv_bytes_per_position": 147456, "target": {...}, "drafter": {...}}

holds the arithmetic itself: a pass takes its launch, then whichever is longer, reading the weights
once or multiplying its rows (rounded up to whole tiles), then reading the KV of its context.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from dspark_backend.bench.errors import BenchError
from dspark_backend.bench.jsonl import shipped

Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class TableCurve(BaseModel):
    """Seconds at some numbers of rows and anchors, both ascending; a CycleCost."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["table"]
    assumption: str = Field(min_length=1)
    rows: tuple[Count, ...] = Field(min_length=1)
    verify_s_at: tuple[Positive, ...] = Field(alias="verify_s")
    per_request_s: NotNegative = 0.0
    per_position_s: NotNegative = 0.0
    anchors: tuple[Count, ...] = Field(min_length=1)
    draft_s_at: tuple[NotNegative, ...] = Field(alias="draft_s")

    @model_validator(mode="after")
    def _aligned(self) -> TableCurve:
        for xs, seconds, name in (
            (self.rows, self.verify_s_at, "rows and verify_s"),
            (self.anchors, self.draft_s_at, "anchors and draft_s"),
        ):
            if len(xs) != len(seconds):
                raise ValueError(f"{name} differ in length: {len(xs)} and {len(seconds)}")
            if any(b <= a for a, b in pairwise(xs)):
                raise ValueError(f"{name.split()[0]} must ascend")
        return self

    def verify_s(self, rows: int, requests: int, context: int) -> float:
        """See :class:`~dspark_backend.speculation.candidate.CycleCost`."""
        extra = self.per_request_s * max(0, requests - 1) + self.per_position_s * context
        return _interpolated(self.rows, self.verify_s_at, rows) + extra

    def draft_s(self, anchors: int) -> float:
        """See :class:`~dspark_backend.speculation.candidate.CycleCost`."""
        return _interpolated(self.anchors, self.draft_s_at, anchors) if anchors else 0.0


class Work(BaseModel):
    """What a network has to do in a call."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights_bytes: Positive
    flop_per_row: Positive
    launch_s: NotNegative
    rows_per_anchor: Count = 1


class RooflineCurve(BaseModel):
    """Seconds by arithmetic on bandwidth and compute; a CycleCost."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["roofline"]
    assumption: str = Field(min_length=1)
    bytes_per_s: Positive
    flop_per_s: Positive
    tile_rows: Count
    kv_bytes_per_position: NotNegative
    target: Work
    drafter: Work

    def verify_s(self, rows: int, requests: int, context: int) -> float:
        """See :class:`~dspark_backend.speculation.candidate.CycleCost`."""
        kv_s = context * self.kv_bytes_per_position / self.bytes_per_s
        return self._call_s(self.target, rows) + kv_s

    def draft_s(self, anchors: int) -> float:
        """See :class:`~dspark_backend.speculation.candidate.CycleCost`."""
        rows = anchors * self.drafter.rows_per_anchor
        return self._call_s(self.drafter, rows) if anchors else 0.0

    def _call_s(self, work: Work, rows: int) -> float:
        tiles = math.ceil(rows / self.tile_rows) * self.tile_rows
        compute_s = tiles * work.flop_per_row / self.flop_per_s
        return work.launch_s + max(work.weights_bytes / self.bytes_per_s, compute_s)


Curve = Annotated[TableCurve | RooflineCurve, Field(discriminator="kind")]


def read_curve(name: str) -> tuple[str, TableCurve | RooflineCurve]:
    """The curve of a JSON file, or the one of that name that ships (``h200-like``,
    ``two-core-cpu``), and what to call it.

    Raises BenchError where there is none, or it cannot be read.
    """
    path: Path = shipped("curves", name, ".json")
    try:
        return path.stem, TypeAdapter(Curve).validate_json(path.read_bytes())
    except OSError as error:
        raise BenchError(f"cannot read {path}: {error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise BenchError(f"{path}: {where}: {first['msg']}") from error


def _interpolated(xs: Sequence[int], ys: Sequence[float], x: int) -> float:
    """``ys`` at ``x``: the first value before the first point, the last slope after the last."""
    if x <= xs[0]:
        return ys[0]
    if x > xs[-1]:
        slope = (ys[-1] - ys[-2]) / (xs[-1] - xs[-2]) if len(xs) > 1 else 0.0
        return ys[-1] + max(slope, 0.0) * (x - xs[-1])
    right = bisect_left(xs, x)
    share = (x - xs[right - 1]) / (xs[right] - xs[right - 1])
    return ys[right - 1] + share * (ys[right] - ys[right - 1])
