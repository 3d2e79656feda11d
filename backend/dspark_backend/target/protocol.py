"""What the engine's loop asks of a target, wherever it runs."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dspark_backend.checkpoint.config import TargetConfig
from dspark_backend.kv.budget import KVShape
from dspark_backend.kv.sequence import Storage
from dspark_backend.target.batch import Batch


@dataclass(frozen=True, slots=True)
class Pass:
    """What one pass gave, where the target runs.

    ``logits`` [sum of wanted rows, V], in batch order, of a float dtype. ``features`` float32
    [R, len(taps) * d]: the residual stream of every row after the tapped layers, side by side
    (DSPARK.md section 2; tap -1 is the embedding), or [R, 0] without taps. Both are the pass's own:
    a later one does not write to them.
    """

    logits: Tensor
    features: Tensor


class Target(Protocol):
    """A model in memory. Used by one thread at a time."""

    @property
    def config(self) -> TargetConfig: ...

    @property
    def max_positions(self) -> int:
        """The most positions that a sequence may have."""

    @property
    def kv_shape(self) -> KVShape:
        """What a position of a sequence takes up."""

    def storage(self, draft: KVShape | None, limit_bytes: int) -> Storage:
        """Room for sequences that this target reads, of ``limit_bytes`` in all; ``draft`` is what a
        position of a drafter's context takes up, if there is one."""

    def forward(self, batch: Batch, taps: Collection[int] = ()) -> Pass:
        """Run the rows of ``batch``; writes their keys and values, commits nothing.

        ``taps`` are layer ids in ascending order; a drafter's do not have the last layer among
        them, since what follows it is the final norm, and training's do. A row's results do not
        depend on the rest of the batch.

        Raises ValueError for rows that there is no room for.
        """

    def wait(self) -> None:
        """Return when everything asked of it so far is computed: for whoever takes the time."""
