"""The drafter on the CPU, one call a cycle for all sessions: parallel stage, sequential stage.

What the engine's loop asks for (``speculation/protocol.py``). The arithmetic of an anchor's block
is its own: other anchors of the call change no bit of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dspark_backend.catalog.files import ModelFiles
from dspark_backend.drafter.checkpoint import DrafterFiles, open_drafter
from dspark_backend.drafter.sequential import SequentialStage
from dspark_backend.drafter.weights import DraftLayer, load_weights
from dspark_backend.kernels.draft_attention.cpu import attend_block
from dspark_backend.kernels.norm.cpu import add_rms_norm, rms_norm
from dspark_backend.kernels.rope.cpu import rope_append
from dspark_backend.kernels.swiglu.cpu import silu_mul
from dspark_backend.kv.budget import KVShape
from dspark_backend.kv.contiguous import contiguous
from dspark_backend.kv.sequence import Positions
from dspark_backend.speculation.protocol import Anchor, Proposal
from dspark_backend.speculation.vocabulary import DraftVocabulary
from dspark_backend.target.precision import Precision
from dspark_backend.target.rope import tables

Rows = NDArray[np.float32]


class DSparkDrafter:
    """A trained drafter, ready to draft for ``target``.

    ``max_positions`` bounds the target's sequences. Not thread-safe.
    """

    def __init__(
        self,
        files: DrafterFiles,
        target: ModelFiles,
        max_positions: int,
        precision: Precision = Precision.INT8X16,
    ) -> None:
        self.config = files.config
        self.taps = files.config.target_layer_ids
        self.block_size = files.config.block_size
        shape = files.config.shape
        self.context_shape = KVShape(shape.num_layers, shape.num_kv_heads, shape.head_dim)
        self._shape = shape
        self._weights = load_weights(files, target, precision)
        vocabulary = (
            DraftVocabulary.whole(files.config.output_size)
            if files.d2t is None
            else DraftVocabulary(files.d2t.numpy())
        )
        self._stage = SequentialStage(self._weights, self.config, vocabulary, files.calibration)
        # A block may begin at the last position: its slots lie past it.
        self._cos, self._sin = tables(shape, max_positions + self.block_size)

    @classmethod
    def load(
        cls,
        folder: Path,
        target: ModelFiles,
        max_positions: int,
        precision: Precision = Precision.INT8X16,
    ) -> DSparkDrafter:
        """Open the checkpoint in ``folder``.

        Raises ModelFormatError for a damaged one, or one for another target.
        """
        return cls(open_drafter(folder, target.config), target, max_positions, precision)

    def extend(self, context: Positions, features: torch.Tensor) -> None:
        """Append ``features`` [n, feature_size] of the next n committed positions."""
        kv = contiguous(context)
        count, shape, weights = len(features), self._shape, self._weights
        if not count:
            return
        end = context.length + count
        if end > context.capacity:
            raise ValueError(f"no room for {end} positions: {context.capacity} are reserved")
        mixed = np.empty((count, shape.hidden_size), np.float32)
        weights.fc(features.contiguous().numpy(), mixed)
        rms_norm(mixed, weights.hidden_norm, shape.rms_norm_eps, mixed)
        positions = np.arange(context.length, end)
        projected = np.empty((count, 2 * shape.num_kv_heads * shape.head_dim), np.float32)
        nobody = np.empty((count, 0, shape.head_dim), np.float32)
        for index, layer in enumerate(weights.layers):
            layer.kv(mixed, projected)
            rope_append(
                projected, positions, self._cos, self._sin, layer.q_norm, layer.k_norm,
                shape.rms_norm_eps, nobody, kv.keys[index], kv.values[index],
            )  # fmt: skip
        context.length = end

    def propose(self, anchors: Sequence[Anchor]) -> list[Proposal]:
        """Blocks with their calibrated survivals; contexts are not changed.

        Raises ValueError for an anchor whose known tokens leave no slot to draft.
        """
        for anchor in anchors:
            if len(anchor.known) >= self.block_size:
                raise ValueError(
                    f"{len(anchor.known)} tokens are known after the anchor: a block of "
                    f"{self.block_size} has no slot left to draft"
                )
        return self._stage.run(self._parallel(anchors), anchors) if anchors else []

    def _parallel(self, anchors: Sequence[Anchor]) -> Rows:
        """The backbone over all blocks: normed hidden states, float32 [S, g, d]."""
        shape, weights, size = self._shape, self._weights, self.block_size
        eps, rows = shape.rms_norm_eps, len(anchors) * size
        ids = torch.full((len(anchors), size), self.config.mask_token_id)
        ids[:, 0] = torch.tensor([anchor.token for anchor in anchors])
        x: Rows = weights.embedding[ids.flatten()].float().numpy()
        normed, delta = np.empty_like(x), np.empty_like(x)
        gate_up = np.empty((rows, 2 * shape.intermediate_size), np.float32)
        gated = np.empty((rows, shape.intermediate_size), np.float32)
        for index, layer in enumerate(weights.layers):
            if index == 0:
                rms_norm(x, layer.input_norm, eps, normed)
            layer.output(self._attention(index, layer, anchors, normed), delta)
            add_rms_norm(x, delta, layer.post_norm, eps, normed)
            layer.gate_up(normed, gate_up)
            silu_mul(gate_up, gated)
            layer.down(gated, delta)
            is_last = index + 1 == len(weights.layers)
            following = weights.norm if is_last else weights.layers[index + 1].input_norm
            add_rms_norm(x, delta, following, eps, normed)
        return normed.reshape(len(anchors), size, shape.hidden_size)

    def _attention(
        self, index: int, layer: DraftLayer, anchors: Sequence[Anchor], normed: Rows
    ) -> Rows:
        shape, size = self._shape, self.block_size
        heads, kv_heads, width = shape.num_heads, shape.num_kv_heads, shape.head_dim
        qkv = np.empty((len(normed), (heads + 2 * kv_heads) * width), np.float32)
        layer.qkv(normed, qkv)
        q = np.empty((size, heads, width), np.float32)
        keys = np.empty((kv_heads, size, width), np.float32)
        values = np.empty_like(keys)
        mixed = np.empty((len(normed), heads, width), np.float32)
        slots = np.arange(size)
        for number, anchor in enumerate(anchors):
            mine = slice(number * size, (number + 1) * size)
            start = anchor.context.length
            # The tables from the anchor on: slot i is turned as position start + i, kept at i.
            rope_append(
                qkv[mine], slots, self._cos[start:], self._sin[start:], layer.q_norm,
                layer.k_norm, shape.rms_norm_eps, q, keys, values,
            )  # fmt: skip
            context = contiguous(anchor.context)
            attend_block(
                q, context.keys[index], context.values[index], start, keys, values, mixed[mine]
            )
        return mixed.reshape(len(normed), heads * width)
