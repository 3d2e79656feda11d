"""What the host knows of a flight beforehand: who takes part, where their pages are, how their
tokens are chosen, and how far each of them may be by now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark_backend.ahead.protocol import Plan, Start
from dspark_backend.kernels.recording import bucket
from dspark_backend.kernels.verify.contract import Rule
from dspark_backend.kv.paged import paged
from dspark_backend.request import SamplingParams
from dspark_backend.sampling.device import wrapped
from dspark_backend.target.graphs import COLUMNS, ROWS

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Leg:
    """The arrays of a cycle of ``plan``, by what reads them: ``rows``, the pass over anchors and
    drafts with its verdict, ``blocks``, the drafter, and ``table`` both. ``longest`` bounds the
    rows of a step, ``small`` says that all is filled up to sizes that recordings are made for."""

    plan: Plan
    rows: Arrays
    blocks: Arrays
    table: NDArray[np.int32]
    longest: int
    small: bool


class Route:
    """Of steps that stand at ``starts``, drafts coming in blocks of ``block_size``. With
    ``recorded``, there is a request to spare, whose page is nobody's: rows that fill up are its."""

    def __init__(self, starts: Sequence[Start], block_size: int, *, recorded: bool) -> None:
        self.kvs = [paged(start.kv) for start in starts]
        self.pool = self.kvs[0].pool
        self._size = block_size
        self._recorded = recorded
        self._padded = bucket(len(starts) + 1) if recorded else len(starts)
        self._bounds = [kv.length for kv in self.kvs]
        self.settings = _settings([start.sampling for start in starts], self._padded)
        widest = max(len(kv.pages) for kv in self.kvs)
        self._table = np.full(
            (self._padded, -(-widest // COLUMNS) * COLUMNS), self.pool.scratch, np.int32
        )
        for row, kv in zip(self._table, self.kvs, strict=False):
            row[: len(kv.pages)] = kv.pages
        state = np.zeros((2, self._padded), np.int32)
        state[0, : len(starts)] = self._bounds
        state[1, : len(starts)] = [start.token for start in starts]
        self.state: Arrays = {"length": state[0], "token": state[1]}
        """Committed lengths and last tokens, where the flight begins."""

    def leg(self, plan: Plan) -> Leg:
        """The next cycle, which may find every step at the furthest that it can be.

        Raises ValueError where there may be no room for it.
        """
        reach = [bound + 1 + n for bound, n in zip(self._bounds, plan.lengths, strict=True)]
        furthest = [*reach]
        for place in plan.drafting:
            furthest[place] = max(reach[place], self._bounds[place] + self._size)
        for kv, end in zip(self.kvs, furthest, strict=True):
            if end > kv.capacity:
                raise ValueError(f"{end} positions may be used: room for {kv.capacity} reserved")
        rows = len(self.kvs) + sum(plan.lengths)
        small = self._recorded and rows <= ROWS and len(plan.drafting) * self._size <= ROWS
        columns = -(-max(furthest) // self.pool.page_size)
        if small:
            columns = -(-columns // COLUMNS) * COLUMNS
        over = self._rows(plan.lengths, bucket(rows) if small else rows)
        longest = int(np.diff(over["offsets"]).max())
        self._bounds = reach
        return Leg(
            plan,
            over,
            self._blocks(plan.drafting, bucket(len(plan.drafting)) if small else None),
            self._table[:, :columns],
            1 << (longest - 1).bit_length() if small else longest,
            small,
        )

    def judged(
        self, plan: Plan, accepted: NDArray[np.int32], tokens: NDArray[np.int32]
    ) -> list[tuple[int, int]]:
        """How many drafts of a cycle of ``plan`` stood, and which token follows them, for each
        step; by those that fell, it is not as far as it could have been."""
        stood = [int(count) for count in accepted[: len(plan.lengths)]]
        for place, (length, count) in enumerate(zip(plan.lengths, stood, strict=True)):
            self._bounds[place] -= length - count
        return [(count, int(token)) for count, token in zip(stood, tokens, strict=False)]

    def _rows(self, lengths: Sequence[int], rows: int) -> Arrays:
        """The anchor of every step and the drafts after it, filled up to ``rows``."""
        counts = [1 + length for length in lengths]
        more = rows - sum(counts)
        if more:
            counts.append(more)
        slot = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])
        ends = np.full(self._padded + 1, rows, np.int32)
        ends[: len(counts) + 1] = np.cumsum([0, *counts])
        return {
            "request": np.repeat(np.arange(len(counts)), counts),
            "slot": slot,
            "column": np.minimum(slot, self._size).astype(np.int64),
            "wanted": np.arange(rows),
            "offsets": ends,
        }

    def _blocks(self, drafting: Sequence[int], blocks: int | None) -> Arrays:
        """The rows of the blocks of those who are drafting, filled up to ``blocks``."""
        if not drafting:
            return {}
        size, count = self._size, len(drafting) if blocks is None else blocks
        which = np.full(count, len(self.kvs), np.int64)
        which[: len(drafting)] = drafting
        return {
            "which": which,
            "draft_request": np.repeat(np.arange(count), size),
            "draft_slot": np.tile(np.arange(size, dtype=np.int32), count),
            "draft_offsets": (np.arange(count + 1) * size).astype(np.int32),
        }


def _settings(samplings: Sequence[SamplingParams], padded: int) -> Arrays:
    """How the tokens of every step are chosen, greedily for those that fill up."""
    made: Arrays = {
        "rules": np.full(padded, Rule.GREEDY, np.int32),
        "temperatures": np.ones(padded, np.float32),
        "seeds": np.zeros(padded, np.int64),
        "live": np.zeros(padded, np.int32),
    }
    for place, sampling in enumerate(samplings):
        made["live"][place] = 1
        if sampling.temperature > 0.0:
            made["rules"][place] = Rule.COUPLED
            made["temperatures"][place] = sampling.temperature
            made["seeds"][place] = wrapped(sampling.seed)
    return made
