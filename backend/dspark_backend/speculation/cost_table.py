"""What the parts of a cycle cost on one machine, as measured, and the conditions it holds under."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

SCHEMA_VERSION: Final = 1

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Slope = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class Conditions(BaseModel):
    """Whose seconds these are: a change of any field makes a table another machine's or model's.

    ``cores`` are those the process may use, ``model`` is the identity of the model's files,
    ``drafter`` that of the drafter's, None without one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    cpu: str
    cpu_flags: tuple[str, ...]
    cores: int
    threads: int
    software: str
    model: str
    precision: str
    drafter: str | None

    def difference(self, other: Conditions) -> str:
        """The fields in which ``other`` differs, for a person; empty when it does not."""
        mine, theirs = self.model_dump(), other.model_dump()
        return ", ".join(
            f"{name} {theirs[name]!r} instead of {mine[name]!r}"
            for name in mine
            if mine[name] != theirs[name]
        )


class CostTable(BaseModel):
    """Measured seconds.

    ``verify_s[i]`` is a pass of the target over ``rows[i]`` rows of one sequence that attend to
    ``context`` positions before them, logits of all rows included. On top of that come
    ``request_s`` for each further sequence in the pass, ``position_s`` for each further position
    that the pass reads, and ``pair_s`` for each further (row, position) that it multiplies.
    ``draft_s[i]`` is a call of the drafter for ``anchors[i]`` blocks; both are empty without one.
    ``conditions`` is None for a curve that was not measured here: one written by hand.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = SCHEMA_VERSION
    conditions: Conditions | None = None
    context: int = Field(default=0, ge=0)
    rows: tuple[Count, ...] = Field(min_length=1)
    verify_s: tuple[Seconds, ...]
    request_s: Slope = 0.0
    position_s: Slope = 0.0
    pair_s: Slope = 0.0
    anchors: tuple[Count, ...] = ()
    draft_s: tuple[Seconds, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, counts, seconds in (
            ("verify_s", self.rows, self.verify_s),
            ("draft_s", self.anchors, self.draft_s),
        ):
            if len(counts) != len(seconds):
                raise ValueError(f"{name} has {len(seconds)} values for {len(counts)} counts")
            if any(a >= b for a, b in pairwise(counts)):
                raise ValueError(f"the counts of {name} do not ascend: {counts}")
        return self

    def scaled(self, verify: tuple[float, ...], slopes: float, draft: float) -> CostTable:
        """This table with ``verify_s[i]`` times ``verify[i]``, the slopes times ``slopes``, and
        ``draft_s`` times ``draft``: what it would show if it were measured now."""
        if len(verify) != len(self.rows) or not all(map(math.isfinite, (*verify, slopes, draft))):
            raise ValueError(f"{len(verify)} factors for {len(self.rows)} rows, all finite")
        return self.model_copy(
            update={
                "verify_s": tuple(s * f for s, f in zip(self.verify_s, verify, strict=True)),
                "request_s": self.request_s * slopes,
                "position_s": self.position_s * slopes,
                "pair_s": self.pair_s * slopes,
                "draft_s": tuple(s * draft for s in self.draft_s),
            }
        )
