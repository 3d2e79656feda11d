"""Is a drafter wired to its target as it was trained? An acceptance self-check.

A checkpoint whose slots were trained one place further right, whose taps are off by one or whose
vocabulary map is another's reads fine and accepts almost nothing (DSPARK.md, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dspark_backend.drafter.model import DraftModel
from dspark_backend.training.blocks import trainable
from dspark_backend.training.cycles import draft_everywhere
from dspark_backend.training.features import Example

_SHIFTS = (-1, 0, 1)


@dataclass(frozen=True, slots=True)
class Placement:
    """How often the first draft equals the token ``shift`` places after the one it stands for."""

    hits: dict[int, float]

    @property
    def complaint(self) -> str | None:
        """What is wrong, in words; None where drafts agree best with their own place."""
        best = max(self.hits, key=lambda shift: (self.hits[shift], shift == 0))
        if best == 0:
            return None
        return (
            f"the drafts agree with the token {best:+d} places from theirs "
            f"({self.hits[best]:.0%}) more often than with their own ({self.hits[0]:.0%}): the "
            "checkpoint was trained for another placement of slots or other layers"
        )


def placement(
    model: DraftModel, examples: Sequence[Example], d2t: torch.Tensor | None
) -> Placement:
    """Compare the first drafts at every answer position with the tokens around their place."""
    hits = dict.fromkeys(_SHIFTS, 0)
    count = 0
    for example in filter(trainable, examples):
        drafts, _ = draft_everywhere(model, example, d2t)
        tokens = example.tokens.tolist()
        for row, draft in enumerate(drafts[:, 0].tolist()):
            place = example.first + row + 1
            if place + 1 < len(tokens):
                count += 1
                for shift in _SHIFTS:
                    hits[shift] += draft == tokens[place + shift]
    return Placement({shift: hit / count if count else 0.0 for shift, hit in hits.items()})
