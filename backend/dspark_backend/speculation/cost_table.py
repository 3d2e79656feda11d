"""What the parts of a cycle cost on one machine, as measured, and the conditions it holds under."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

SCHEMA_VERSION: Final = 2

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
    ``draft_s[i]`` is what drafting ``anchors[i]`` blocks takes: the drafter's call, and bringing
    its contexts up to date before it; both are empty without a drafter.
    ``conditions`` is None for a curve that was not measured here: one written by hand.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[2] = SCHEMA_VERSION
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

    @property
    def disturbed(self) -> bool:
        """Whether something else ran meanwhile: real curves are jagged, but none says that a pass
        of more rows is shorter by a third."""
        return any(
            later < 0.67 * earlier
            for times in (self.verify_s, self.draft_s)
            for index, earlier in enumerate(times)
            for later in times[index + 1 :]
        )

    def undisturbed(self) -> CostTable:
        """The same table, where no pass takes longer than one of more rows. Whatever disturbs a
        measurement makes it longer, so the shorter of the two is the one to believe."""
        return self.model_copy(
            update={"verify_s": _least(self.verify_s), "draft_s": _least(self.draft_s)}
        )


def _least(times: tuple[float, ...]) -> tuple[float, ...]:
    """For each time the least of it and all later ones."""
    return tuple(min(times[index:]) for index in range(len(times)))
