"""The drafter on its target's device, one call a cycle for all sessions.

Its context lies in the pages of the target's keys and values, in layers after theirs. A block's own
keys and values are written behind the context, where its next tokens will overwrite them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from dspark_backend.drafter.checkpoint import DrafterFiles, open_drafter
from dspark_backend.drafter.device_sequential import DeviceSequentialStage
from dspark_backend.drafter.device_weights import load_device_weights
from dspark_backend.errors import ModelFormatError
from dspark_backend.kernels.norm.triton import rms_norm
from dspark_backend.kernels.ragged_attention.contract import Sight
from dspark_backend.kernels.recording import Function, Piece, Recordings, bucket
from dspark_backend.kernels.rope.triton import Rotation
from dspark_backend.kernels.swiglu.triton import silu_mul
from dspark_backend.kernels.upload import upload
from dspark_backend.kv.budget import KVShape
from dspark_backend.kv.paged import paged_context
from dspark_backend.kv.sequence import Positions
from dspark_backend.speculation.protocol import Anchor, Proposal
from dspark_backend.target.device import DeviceDecoder
from dspark_backend.target.graphs import COLUMNS, ROWS
from dspark_backend.target.paged_rows import Layout, PagedRows, Span
from dspark_backend.target.rope import tables


class DeviceDrafter:
    """A trained drafter, ready to draft for ``target``, whose dtype it runs in. Not thread-safe."""

    def __init__(
        self, files: DrafterFiles, target: DeviceDecoder, recordings: Recordings | None = None
    ) -> None:
        """With ``recordings``, small calls are replayed. Raises ModelFormatError for a drafter
        whose keys and values do not fit into the target's pages."""
        shape = files.config.shape
        ours, theirs = (shape.num_kv_heads, shape.head_dim), target.kv_shape
        if ours != (theirs.kv_heads, theirs.head_dim):
            raise ModelFormatError(
                f"{files.folder}: {ours[0]} kv heads of width {ours[1]} do not fit into the pages "
                f"of a target with {theirs.kv_heads} of {theirs.head_dim}: such a drafter runs on "
                "the CPU only"
            )
        self.config = files.config
        self.taps = files.config.target_layer_ids
        self.block_size = files.config.block_size
        self.context_shape = KVShape(shape.num_layers, *ours, target.dtype.itemsize)
        self._recordings = recordings
        self._device, self._dtype = target.device, target.dtype
        self._first = target.config.num_layers
        self._eps = shape.rms_norm_eps
        self._weights = load_device_weights(files, target.weights)
        self._stage = DeviceSequentialStage(self._weights, files.config, files.calibration)
        # A block may begin at the last position: its slots lie past it.
        rotations = tables(shape, target.max_positions + self.block_size)
        cos, sin = (torch.from_numpy(table).to(self._device) for table in rotations)
        self._rotations = [
            Rotation(cos, sin, layer.q_norm, layer.k_norm, self._eps)
            for layer in self._weights.layers
        ]

    @classmethod
    def load(
        cls, folder: Path, target: DeviceDecoder, recordings: Recordings | None = None
    ) -> DeviceDrafter:
        """Open the checkpoint in ``folder``.

        Raises ModelFormatError for a damaged one, or one for another target.
        """
        return cls(open_drafter(folder, target.config), target, recordings)

    def extend(self, context: Positions, features: Tensor) -> None:
        """As :meth:`Drafter.extend`. Raises CapacityError where no room was reserved and none is
        left."""
        mine, count = paged_context(context), len(features)
        if not count:
            return
        mine.reserve(mine.length + count)
        layout = Layout.of([Span(mine.owner, mine.length, count)])
        small = self._recordings is not None and count <= ROWS
        size = bucket(count) if small else count
        if small:
            layout = layout.padded(size)

        def run(there: Mapping[str, Tensor]) -> tuple[()]:
            self.read(layout.reading(there), there["features"])
            return ()

        self._run(("extend",), run, layout, {}, {"features": Piece(features, size)}, small=small)
        mine.length += count

    def propose(self, anchors: Sequence[Anchor]) -> list[Proposal]:
        """As :meth:`Drafter.propose`.

        Raises ValueError for an anchor whose known tokens leave no slot to draft.
        """
        for anchor in anchors:
            if len(anchor.known) >= self.block_size:
                raise ValueError(
                    f"{len(anchor.known)} tokens are known after the anchor: a block of "
                    f"{self.block_size} has no slot left to draft"
                )
        return self._drafted(anchors) if anchors else []

    def _drafted(self, anchors: Sequence[Anchor]) -> list[Proposal]:
        rows = len(anchors) * self.block_size
        small = self._recordings is not None and rows <= ROWS
        layout = self._lay_out(anchors, COLUMNS if small else 1)
        if small:
            rows = bucket(len(anchors)) * self.block_size
            layout = layout.padded(rows, ids=rows)
        groups = self._stage.groups(anchors)
        arrays = self._stage.arrays(anchors, groups, bucket if small else _as_many)

        def run(there: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
            rows = layout.reading(there)
            hidden = self._parallel(rows, rows.extra["ids"])
            return self._stage.chained(hidden, there)

        made = self._run(("draft",), run, layout, arrays, {}, small=small)
        recordings = self._recordings if small else None
        return self._stage.proposals(anchors, groups, made, recordings)

    def _lay_out(self, anchors: Sequence[Anchor], columns: int = 1) -> Layout:
        """The rows of all blocks, the anchor and then masks."""
        size = self.block_size
        ids = np.full((len(anchors), size), self.config.mask_token_id)
        ids[:, 0] = [anchor.token for anchor in anchors]
        contexts = [paged_context(anchor.context) for anchor in anchors]
        spans = [Span(context.owner, context.length, size) for context in contexts]
        return Layout.of(spans, columns, ids=ids.reshape(-1))

    def _run(
        self,
        key: tuple[object, ...],
        function: Function,
        layout: Layout,
        arrays: Mapping[str, NDArray[Any]],
        pieces: Mapping[str, Piece],
        *,
        small: bool,
    ) -> tuple[Tensor, ...]:
        """What ``function`` gives, replayed where that is asked for and the call is ``small``."""
        every = {**layout.arrays, **arrays}
        if self._recordings is None:
            there = upload(every, self._device)
            return function(there | {name: piece.tensor for name, piece in pieces.items()})
        if not small:
            return self._recordings.launch(function, every, pieces)
        whole = (*key, id(self), id(layout.pool), layout.longest)
        return self._recordings.run(whole, function, every, pieces, (self, layout.pool))

    def read(self, rows: PagedRows, features: Tensor) -> None:
        """Write the context's keys and values of ``features`` [R, len(taps) * d] of ``rows``;
        launches alone, and no length is changed."""
        mixed = self._weights.fc(features.to(self._dtype)).float()
        normed = rms_norm(mixed, self._weights.hidden_norm, self._eps, self._dtype)
        for index, layer in enumerate(self._weights.layers):
            rows.append(self._first + index, layer.kv(normed), self._rotations[index])

    def blocks(self, rows: PagedRows, first: Tensor) -> Tensor:
        """A block after each token of ``first`` int32 [S], ``rows`` being those of the blocks, the
        anchor's and then g - 1 slots: tokens (-1 ends a block) and survivals, float64 [S, 2 g].
        Launches alone; no context is changed."""
        ids = torch.full(
            (len(first), self.block_size), self.config.mask_token_id, device=first.device
        )
        ids[:, 0] = first
        return self._stage.unguided(self._parallel(rows, ids.view(-1)), first)

    def proposal(self, block: NDArray[np.float64]) -> Proposal:
        """A row of what :meth:`blocks` gives."""
        return self._stage.proposal(block)

    def _parallel(self, rows: PagedRows, ids: Tensor) -> Tensor:
        """The backbone over all blocks of tokens ``ids`` int64 [S * g]: normed hidden states
        [S, g, d] of the weights' dtype."""
        weights, eps = self._weights, self._eps
        x = functional.embedding(ids, weights.embedding).float()
        normed = rms_norm(x, weights.layers[0].input_norm, eps, self._dtype)
        for index, layer in enumerate(weights.layers):
            at, turn = self._first + index, self._rotations[index]
            delta = layer.output(rows.attend(at, layer.qkv(normed), turn, Sight.BLOCK))
            normed = rms_norm(x, layer.post_norm, eps, self._dtype, delta)
            delta = layer.down(silu_mul(layer.gate_up(normed)))
            is_last = index + 1 == len(weights.layers)
            following = weights.norm if is_last else weights.layers[index + 1].input_norm
            normed = rms_norm(x, following, eps, self._dtype, delta)
        return normed.view(-1, self.block_size, normed.shape[1])


def _as_many(count: int) -> int:
    return count
