"""What one pass of the target reads: the flattened new rows of several sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dspark_backend.kv.sequence import KV


@dataclass(frozen=True, slots=True)
class Rows:
    """New tokens of one sequence, at positions ``kv.length .. kv.length + len(tokens) - 1``.

    The pass writes their keys and values (room must be reserved) and leaves ``kv.length`` alone:
    committing is the caller's. ``logits`` says of how many of the last rows logits are wanted.
    """

    kv: KV
    tokens: Sequence[int]
    logits: int


@dataclass(frozen=True, slots=True)
class Batch:
    """The sequences that share a pass; each at most once."""

    sequences: Sequence[Rows]

    @property
    def rows(self) -> int:
        return sum(len(rows.tokens) for rows in self.sequences)
