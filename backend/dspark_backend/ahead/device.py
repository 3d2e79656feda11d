"""Whole cycles on a device: drafts, the pass over them, the draft contexts and the verdict, one
after the other, without a decision of the host in between.

What a cycle starts from, the committed length of every step and its last token, is what the cycle
before it left on the device. All else the host knows beforehand: who takes part, where their pages
are, and how many drafts are verified.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspark_backend.ahead.protocol import Landed, Plan, Start
from dspark_backend.ahead.rows import rows_after
from dspark_backend.kernels.download import Download
from dspark_backend.kernels.recording import Piece, Recordings, Tensors, bucket
from dspark_backend.kernels.upload import upload
from dspark_backend.kernels.verify.contract import Batch, Rule
from dspark_backend.kernels.verify.triton import verify
from dspark_backend.kv.paged import paged
from dspark_backend.kv.pages import PagePool
from dspark_backend.request import SamplingParams
from dspark_backend.sampling.device import answered, wrapped
from dspark_backend.speculation.protocol import Proposal
from dspark_backend.target.device import DeviceDecoder
from dspark_backend.target.graphs import COLUMNS, ROWS
from dspark_backend.target.paged_rows import PagedRows

_NOTHING = Proposal((), (), "")


class BlockDrafter(Protocol):
    """What a cycle asks of a drafter: as :class:`~dspark_backend.speculation.protocol.Drafter`, of
    rows whose positions the device knows, and without waiting."""

    @property
    def taps(self) -> tuple[int, ...]: ...

    @property
    def block_size(self) -> int: ...

    def blocks(self, rows: PagedRows, first: Tensor) -> Tensor:
        """A block of g drafts after each token of ``first`` int32 [S], ``rows`` being those of the
        blocks, the anchor's and then g - 1 slots: tokens (-1 ends a block) and survivals, float64
        [S, 2 g]."""

    def read(self, rows: PagedRows, features: Tensor) -> None:
        """Write ``features`` [R, len(taps) * d] of ``rows`` to the draft contexts."""

    def proposal(self, block: NDArray[np.float64]) -> Proposal:
        """A row of what :meth:`blocks` gave."""


class DeviceFlights:
    """Flights of ``decoder`` and, where there is one, ``drafter``. With ``recordings``, cycles of
    few rows are recorded whole and replayed. Not thread-safe."""

    def __init__(
        self,
        decoder: DeviceDecoder,
        drafter: BlockDrafter | None,
        recordings: Recordings | None = None,
    ) -> None:
        self.decoder = decoder
        self.drafter = drafter
        self.recordings = recordings
        self.block_size = 0 if drafter is None else drafter.block_size
        self.cycles = 0
        self._taps = () if drafter is None else drafter.taps

    def begin(self, starts: Sequence[Start]) -> DeviceFlight:
        """As :meth:`Flights.begin`."""
        return DeviceFlight(self, starts)

    def cycle(
        self, there: Mapping[str, Tensor], pool: PagePool, longest: int, *, drafting: bool
    ) -> Tensors:
        """Launch a cycle: committed lengths and last tokens after it, int32 [B] each, accepted
        lengths and next tokens (-1: none) int32 [B], and blocks float64 [m, 2 g], m being 0 where
        nobody is drafting."""
        size = self.block_size
        length, token, table = there["length"], there["token"], there["table"]
        said = torch.full((len(length), size + 2), -1, dtype=torch.int32, device=length.device)
        said[:, 0] = token
        blocks = torch.empty(0, 2 * size, dtype=torch.float64, device=length.device)
        if drafting and self.drafter is not None:
            which = there["which"]
            rows = rows_after(
                *(pool, length[which], table[which]),
                *(there["draft_request"], there["draft_slot"], there["draft_offsets"]),
                size,
            )
            blocks = self.drafter.blocks(rows, token[which])
            said[which, 1 : size + 1] = blocks[:, :size].int()
        request, column = there["request"], there["column"]
        # A slot without a draft has no token to be computed, and none that could stand.
        ids = said[request, column].clamp(min=0).long()
        rows = rows_after(
            *(pool, length, table, request, there["slot"], there["offsets"], longest),
            ids=ids,
            wanted=there["wanted"],
        )
        made = self.decoder.run(rows, self._taps)
        if self.drafter is not None:
            self.drafter.read(rows, made.features)
        verdict = verify(
            Batch(
                logits=made.logits,
                offsets=there["offsets"],
                drafts=said[request, column + 1],
                rules=there["rules"],
                temperatures=there["temperatures"],
                seeds=there["seeds"],
                positions=length.long() + 1,
                longest=longest,
            )
        )
        after = length + there["live"] * (verdict.accepted + 1)
        # What has no next token fails once the host knows; until then any token will do.
        return after, verdict.tokens.clamp(min=0), verdict.accepted, verdict.tokens, blocks


class DeviceFlight:
    """See :class:`~dspark_backend.ahead.protocol.Flight`."""

    def __init__(self, flights: DeviceFlights, starts: Sequence[Start]) -> None:
        self._flights = flights
        self._kvs = [paged(start.kv) for start in starts]
        self._pool = self._kvs[0].pool
        # Recordings have rows to spare: those are a request's whose page is nobody's.
        padded = len(starts) if flights.recordings is None else bucket(len(starts) + 1)
        self._bounds = [kv.length for kv in self._kvs]
        self._settings = _settings([start.sampling for start in starts], padded)
        widest = max(len(kv.pages) for kv in self._kvs)
        self._table = np.full(
            (padded, -(-widest // COLUMNS) * COLUMNS), self._pool.scratch, np.int32
        )
        for row, kv in zip(self._table, self._kvs, strict=False):
            row[: len(kv.pages)] = kv.pages
        state = np.zeros((2, padded), np.int32)
        state[0, : len(starts)] = self._bounds
        state[1, : len(starts)] = [start.token for start in starts]
        there = upload({"length": state[0], "token": state[1]}, flights.decoder.device)
        self._length, self._token = there["length"], there["token"]

    def launch(self, plan: Plan) -> DeviceLanding:
        """As :meth:`Flight.launch`."""
        flights, count = self._flights, len(self._kvs)
        size, drafting = flights.block_size, bool(plan.drafting)
        reach = [bound + 1 + n for bound, n in zip(self._bounds, plan.lengths, strict=True)]
        for place in plan.drafting:
            reach[place] = max(reach[place], self._bounds[place] + size)
        for kv, end in zip(self._kvs, reach, strict=True):
            if end > kv.capacity:
                raise ValueError(f"{end} positions may be used: room for {kv.capacity} reserved")
        recordings = flights.recordings
        rows = count + sum(plan.lengths)
        small = recordings is not None and rows <= ROWS and len(plan.drafting) * size <= ROWS
        columns = -(-max(reach) // self._pool.page_size)
        if small:
            columns = -(-columns // COLUMNS) * COLUMNS
        arrays = {
            **self._settings,
            **self._rows(plan.lengths, bucket(rows) if small else rows),
            **self._blocks(plan.drafting, bucket(len(plan.drafting)) if small else None),
            "table": self._table[:, :columns],
        }
        longest = int(np.diff(arrays["offsets"]).max())
        longest = 1 << (longest - 1).bit_length() if small else longest
        run = partial(flights.cycle, pool=self._pool, longest=longest, drafting=drafting)
        pieces = {name: Piece(t, len(t)) for name, t in self._state.items()}
        if recordings is None:
            made = run(upload(arrays, flights.decoder.device) | self._state)
        elif small:
            key = ("cycle", id(flights), id(self._pool), longest, drafting)
            made = recordings.run(key, run, arrays, pieces, (flights, self._pool))
        else:
            made = recordings.launch(run, arrays, pieces)
        flights.cycles += 1
        self._length, self._token, accepted, tokens, blocks = made
        self._bounds = [bound + 1 + n for bound, n in zip(self._bounds, plan.lengths, strict=True)]
        return DeviceLanding(self, plan, Download([accepted, tokens, blocks]))

    def landed(self, plan: Plan, arrays: Sequence[NDArray[Any]]) -> list[Landed]:
        """What a cycle of ``plan`` brought; its steps are no further than that any more."""
        accepted, tokens, blocks = arrays
        drafter = self._flights.drafter
        proposals = [_NOTHING] * len(self._kvs)
        for place, block in zip(plan.drafting, blocks, strict=False):
            assert drafter is not None
            proposals[place] = drafter.proposal(block)
        vocab = self._flights.decoder.config.vocab_size
        landed = []
        for place, proposal in enumerate(proposals):
            stood, token = int(accepted[place]), int(tokens[place])
            self._bounds[place] -= plan.lengths[place] - stood
            landed.append(Landed(partial(answered, stood, token, vocab), proposal))
        return landed

    @property
    def _state(self) -> dict[str, Tensor]:
        return {"length": self._length, "token": self._token}

    def _rows(self, lengths: Sequence[int], rows: int) -> dict[str, NDArray[Any]]:
        """The anchor of every step and the drafts after it, filled up to ``rows``."""
        padded, size = len(self._table), self._flights.block_size
        counts = [1 + length for length in lengths]
        more = rows - sum(counts)
        if more:
            counts.append(more)
        slot = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])
        ends = np.full(padded + 1, rows, np.int32)
        ends[: len(counts) + 1] = np.cumsum([0, *counts])
        return {
            "request": np.repeat(np.arange(len(counts)), counts),
            "slot": slot,
            "column": np.minimum(slot, size).astype(np.int64),
            "wanted": np.arange(rows),
            "offsets": ends,
        }

    def _blocks(self, drafting: Sequence[int], blocks: int | None) -> dict[str, NDArray[Any]]:
        """The rows of the blocks of those who are drafting, filled up to ``blocks``."""
        if not drafting:
            return {}
        size, count = self._flights.block_size, len(drafting) if blocks is None else blocks
        which = np.full(count, len(self._kvs), np.int64)
        which[: len(drafting)] = drafting
        return {
            "which": which,
            "draft_request": np.repeat(np.arange(count), size),
            "draft_slot": np.tile(np.arange(size, dtype=np.int32), count),
            "draft_offsets": (np.arange(count + 1) * size).astype(np.int32),
        }


def _settings(samplings: Sequence[SamplingParams], padded: int) -> dict[str, NDArray[Any]]:
    """How the tokens of every step are chosen, greedily for those that fill up."""
    made: dict[str, NDArray[Any]] = {
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


class DeviceLanding:
    """See :class:`~dspark_backend.ahead.protocol.Landing`."""

    def __init__(self, flight: DeviceFlight, plan: Plan, download: Download) -> None:
        self._flight, self._plan, self._download = flight, plan, download

    def read(self) -> list[Landed]:
        """As :meth:`Landing.read`."""
        return self._flight.landed(self._plan, self._download.arrays())
