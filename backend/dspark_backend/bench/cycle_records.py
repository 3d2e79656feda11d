"""Recorded speculation: what was proposed at every place of a step, and how much would have held.

A file of JSON lines, a step each:

    {"name": "coding-3", "kind": "tool_call", "context": 812, "tokens": 40,
     "cycles": [{"position": 0, "survival": [0.9, 0.7], "accepted": 1, "free": 0}, ...]}

``kind`` is a step kind of the engine, ``context`` the positions before the step's first token and
``tokens`` how many it wrote. A cycle was proposed after ``position`` of them: ``survival`` is the
calibrated survival of each proposed token (non-increasing), ``accepted`` how many of the *whole*
proposal the target would have accepted, ``free`` how many of them the grammar forced.

Speculation never changes what is written, so a step can be replayed under any policy. One that
verifies less than was recorded lands between two recorded places; there the rest of the earlier
proposal stands in, its survivals given what was accepted: less than a drafter asked anew would
offer. Recorded at every position, a replay is exact.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from dspark_backend.bench.errors import BenchError
from dspark_backend.bench.jsonl import read_rows
from dspark_backend.request import StepKind
from dspark_backend.speculation.candidate import BudgetError, Candidate

NotNegative = Annotated[int, Field(ge=0)]


class CycleRecord(BaseModel):
    """One proposal; see the module."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    position: NotNegative
    survival: tuple[float, ...]
    accepted: NotNegative
    free: NotNegative = 0

    @model_validator(mode="after")
    def _possible(self) -> CycleRecord:
        try:
            Candidate(self.survival, free=self.free)
        except BudgetError as error:
            raise ValueError(str(error)) from error
        if not self.free <= self.accepted <= len(self.survival):
            raise ValueError(
                f"{self.accepted} of {len(self.survival)} proposed tokens cannot be accepted "
                f"where {self.free} are free"
            )
        return self


class StepRecord(BaseModel):
    """One step: its cycles in order of position, the first at 0."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = ""
    kind: StepKind
    context: NotNegative
    tokens: Annotated[int, Field(ge=1)]
    cycles: tuple[CycleRecord, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _in_order(self) -> StepRecord:
        positions = [each.position for each in self.cycles]
        if positions[0] != 0 or any(b <= a for a, b in pairwise(positions)):
            raise ValueError("positions must start at 0 and ascend")
        if positions[-1] >= self.tokens:
            raise ValueError(f"a cycle at {positions[-1]} is past the {self.tokens} tokens written")
        return self


@dataclass(frozen=True, slots=True)
class Offer:
    """A proposal at some place: survivals, how many tokens would hold, how many are forced."""

    survival: tuple[float, ...] = ()
    accepted: int = 0
    free: int = 0


def offer_at(step: StepRecord, position: int) -> Offer:
    """What was, or would have been, proposed after ``position`` tokens of ``step``."""
    index = bisect_right(step.cycles, position, key=lambda each: each.position) - 1
    cycle = step.cycles[index]
    done = position - cycle.position
    if done == 0:
        return Offer(cycle.survival, cycle.accepted, cycle.free)
    reached = cycle.survival[done - 1] if done <= cycle.accepted else 0.0
    if reached == 0.0:
        return Offer()  # the text went on otherwise than proposed
    rest = tuple(min(1.0, value / reached) for value in cycle.survival[done:])
    return Offer(rest, cycle.accepted - done, max(0, cycle.free - done))


def read_records(path: Path, limit: int | None = None) -> list[StepRecord]:
    """The first ``limit`` steps of a file; see :func:`read_rows` for the errors."""
    return read_rows(path, StepRecord, limit)


CONDITIONAL: Mapping[StepKind, tuple[float, ...]] = {
    StepKind.TEXT: (0.755,) * 7,
    StepKind.TOOL_CALL: (0.88,) * 7,
}
"""Mean acceptance of each of seven drafts given those before it: accepted lengths of 3.65 and 5.34,
about what the paper reports for Qwen3-4B on chat (3.64) and on code (5.38)."""


def synthetic(
    seed: int,
    steps: int,
    tokens: int,
    conditional: Mapping[StepKind, Sequence[float]] = CONDITIONAL,
    concentration: float = 3.0,
    context: int = 1024,
) -> list[StepRecord]:
    """Made-up steps of ``tokens`` tokens, a proposal at every position, kinds in turn.

    The confidence of every draft is drawn from a beta distribution around ``conditional`` of its
    place (``concentration`` is the sum of its parameters: the larger, the more alike the drafts),
    and whether it holds from the confidence: survivals are calibrated by construction.

    Raises BenchError for no steps, no tokens or means outside (0, 1).
    """
    if steps < 1 or tokens < 1:
        raise BenchError(f"{steps} steps of {tokens} tokens are nothing to replay")
    means = [mean for each in conditional.values() for mean in each]
    if not means or not all(0.0 < mean < 1.0 for mean in means) or concentration <= 0.0:
        raise BenchError("conditional acceptances lie between 0 and 1, their concentration above 0")
    rng = np.random.default_rng(seed)
    kinds = list(conditional)
    return [
        _synthetic_step(
            rng,
            f"synthetic-{number}",
            kinds[number % len(kinds)],
            np.array(conditional[kinds[number % len(kinds)]]),
            tokens,
            concentration,
            context,
        )
        for number in range(steps)
    ]


def _synthetic_step(
    rng: np.random.Generator,
    name: str,
    kind: StepKind,
    means: np.ndarray,
    tokens: int,
    concentration: float,
    context: int,
) -> StepRecord:
    shape = (tokens, len(means))
    confidence = rng.beta(concentration * means, concentration * (1.0 - means), shape)
    holds = rng.random(shape) < confidence
    survival = np.cumprod(confidence, axis=1)
    accepted = np.cumprod(holds, axis=1).sum(axis=1)
    cycles = tuple(
        CycleRecord(position=t, survival=tuple(survival[t].tolist()), accepted=int(accepted[t]))
        for t in range(tokens)
    )
    return StepRecord(name=name, kind=kind, context=context, tokens=tokens, cycles=cycles)
