"""The parts of a cycle that a device goes through on its own: drafting, the pass, the verdict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspark_backend.ahead.protocol import Plan
from dspark_backend.ahead.rows import rows_after
from dspark_backend.kernels.contract import Masks
from dspark_backend.kernels.recording import Function, Piece, Recordings, Tensors
from dspark_backend.kernels.upload import upload
from dspark_backend.kernels.verify.contract import Batch
from dspark_backend.kernels.verify.triton import verify
from dspark_backend.kv.pages import PagePool
from dspark_backend.speculation.protocol import Proposal
from dspark_backend.target.device import DeviceDecoder
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


class DeviceCycle:
    """Launches the parts. What they read is ``there``, by name: what a
    :class:`~dspark_backend.ahead.route.Route` lays out, and ``length`` and ``token`` int32 [B], the
    committed length of every step and its last token. None of them waits."""

    def __init__(
        self, decoder: DeviceDecoder, drafter: BlockDrafter | None, recordings: Recordings | None
    ) -> None:
        self.decoder = decoder
        self.recordings = recordings
        self.block_size = 0 if drafter is None else drafter.block_size
        self.count = 0
        """Passes that were launched."""
        self._drafter = drafter
        self._taps = () if drafter is None else drafter.taps

    def run(
        self,
        key: tuple[object, ...],
        function: Function,
        arrays: Mapping[str, NDArray[Any]],
        left: Mapping[str, Tensor],
        pool: PagePool,
        *,
        small: bool,
    ) -> Tensors:
        """What ``function`` gives for ``arrays`` and for what was ``left`` on the device, replayed
        where that is asked for and the call is ``small``."""
        if self.recordings is None:
            return function({**upload(arrays, self.decoder.device), **left})
        pieces = {name: Piece(tensor, len(tensor)) for name, tensor in left.items()}
        if not small:
            return self.recordings.launch(function, arrays, pieces)
        whole = (*key, id(self), id(pool))
        return self.recordings.run(whole, function, arrays, pieces, (self, pool))

    def drafts(self, there: Mapping[str, Tensor], pool: PagePool) -> tuple[Tensor, Tensor]:
        """What is said after each step's committed tokens, int32 [B, g + 2]: its last token and g
        drafts, -1 where there is none; and the blocks of those that draft, float64 [m, 2 g]."""
        size = self.block_size
        length, token, table = there["length"], there["token"], there["table"]
        said = torch.full((len(length), size + 2), -1, dtype=torch.int32, device=length.device)
        said[:, 0] = token
        blocks = torch.empty(0, 2 * size, dtype=torch.float64, device=length.device)
        if "which" in there and self._drafter is not None:
            which = there["which"]
            rows = rows_after(
                *(pool, length[which], table[which]),
                *(there["draft_request"], there["draft_slot"], there["draft_offsets"]),
                size,
            )
            blocks = self._drafter.blocks(rows, token[which])
            said[which, 1 : size + 1] = blocks[:, :size].int()
        return said, blocks

    def compute(
        self, there: Mapping[str, Tensor], said: Tensor, pool: PagePool, longest: int
    ) -> Tensor:
        """The pass over last tokens and drafts, the draft contexts along with it: logits [R, V]."""
        request = there["request"]
        # A slot without a draft has no token to be computed, and none that could stand.
        ids = said[request, there["column"]].clamp(min=0).long()
        rows = rows_after(
            *(pool, there["length"], there["table"], request, there["slot"], there["offsets"]),
            longest,
            ids=ids,
            wanted=there["wanted"],
        )
        made = self.decoder.run(rows, self._taps)
        if self._drafter is not None:
            self._drafter.read(rows, made.features)
        return made.logits

    def judge(
        self, there: Mapping[str, Tensor], said: Tensor, logits: Tensor, longest: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The verdict on a pass, under ``mask_words`` where there are any: committed lengths and
        last tokens after it, accepted lengths and next tokens (-1: none), int32 [B] each."""
        length = there["length"]
        masks = Masks(there["mask_words"], there["mask_of_row"]) if "mask_words" in there else None
        verdict = verify(
            Batch(
                logits=logits,
                offsets=there["offsets"],
                drafts=said[there["request"], there["column"] + 1],
                rules=there["rules"],
                temperatures=there["temperatures"],
                seeds=there["seeds"],
                positions=length.long() + 1,
                longest=longest,
                masks=masks,
            )
        )
        after = length + there["live"] * (verdict.accepted + 1)
        # What has no next token fails once the host knows; until then any token will do.
        return after, verdict.tokens.clamp(min=0), verdict.accepted, verdict.tokens

    def proposals(self, plan: Plan, blocks: Iterable[NDArray[np.float64]]) -> list[Proposal]:
        """Of each step, what ``blocks`` of those that draft say; nothing of others."""
        made = [_NOTHING] * len(plan.lengths)
        for place, block in zip(plan.drafting, blocks, strict=False):
            assert self._drafter is not None
            made[place] = self._drafter.proposal(block)
        return made
