"""The target's forward pass: Llama, Qwen2 and Qwen3 over a ragged batch of rows.

One layer is ten lines. Everything between the linear layers runs in float32 on the residual
stream, so the precision of the linear layers is the model's precision.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from dspark_backend.checkpoint.config import TargetConfig
from dspark_backend.kernels.attention.cpu import attend
from dspark_backend.kernels.norm.cpu import add_rms_norm, rms_norm
from dspark_backend.kernels.rope.cpu import rope_append
from dspark_backend.kernels.swiglu.cpu import silu_mul
from dspark_backend.kv.budget import KVShape
from dspark_backend.kv.contiguous import ContiguousStorage, SequenceKV, contiguous
from dspark_backend.target.batch import Batch
from dspark_backend.target.linear import Linear
from dspark_backend.target.protocol import Pass
from dspark_backend.target.rope import tables

NO_WEIGHT = np.zeros(0, np.float32)


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer; norms float32 [d], ``q_norm``/``k_norm`` [hd] or [0] for none."""

    input_norm: NDArray[np.float32]
    qkv: Linear
    q_norm: NDArray[np.float32]
    k_norm: NDArray[np.float32]
    output: Linear
    post_norm: NDArray[np.float32]
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class Weights:
    """A target's parameters as the decoder reads them; ``embedding`` [V, d], any float dtype."""

    embedding: torch.Tensor
    layers: Sequence[Layer]
    norm: NDArray[np.float32]
    head: Linear


class _Workspace:
    """Buffers of a pass of ``rows`` rows, kept for the row counts of decoding."""

    def __init__(self, config: TargetConfig, rows: int) -> None:
        heads = config.num_heads + 2 * config.num_kv_heads
        self.normed = np.empty((rows, config.hidden_size), np.float32)
        self.delta = np.empty((rows, config.hidden_size), np.float32)
        self.qkv = np.empty((rows, heads * config.head_dim), np.float32)
        self.q = np.empty((rows, config.num_heads, config.head_dim), np.float32)
        self.mixed = np.empty((rows, config.num_heads, config.head_dim), np.float32)
        self.gate_up = np.empty((rows, 2 * config.intermediate_size), np.float32)
        self.gated = np.empty((rows, config.intermediate_size), np.float32)


class _Caches:
    """Where the sequences of a pass lie, for kernels that read them all in one call."""

    def __init__(self, sequences: Sequence[SequenceKV], spans: Sequence[tuple[int, int]]) -> None:
        self._sequences = sequences  # whose memory must outlive the addresses
        self.spans = np.array(spans, np.int64)
        self.capacities = np.array([kv.keys.shape[2] for kv in sequences], np.int64)
        self._keys = np.array([kv.keys.ctypes.data for kv in sequences], np.int64)
        self._values = np.array([kv.values.ctypes.data for kv in sequences], np.int64)
        self._layer = np.array([kv.keys.strides[0] for kv in sequences], np.int64)

    def keys_of(self, layer: int) -> NDArray[np.int64]:
        """Addresses of the layer's keys."""
        return self._keys + layer * self._layer

    def values_of(self, layer: int) -> NDArray[np.int64]:
        """Addresses of the layer's values."""
        return self._values + layer * self._layer


class Decoder:
    """A target model on the CPU.

    ``max_positions`` bounds every sequence. Not thread-safe: buffers are re-used between passes.
    """

    KEPT_ROWS = 32

    def __init__(self, config: TargetConfig, weights: Weights, max_positions: int) -> None:
        self.config = config
        self.max_positions = max_positions
        self.kv_shape = KVShape(config.num_layers, config.num_kv_heads, config.head_dim)
        self._weights = weights
        self._cos, self._sin = tables(config, max_positions)
        self._workspaces: dict[int, _Workspace] = {}

    def storage(self, draft: KVShape | None, limit_bytes: int) -> ContiguousStorage:
        """As :meth:`Target.storage`."""
        return ContiguousStorage(self.kv_shape, draft, limit_bytes)

    def forward(self, batch: Batch, taps: Collection[int] = ()) -> Pass:
        """As :meth:`Target.forward`."""
        config, weights = self.config, self._weights
        work = self._workspace(batch.rows)
        token_ids = torch.tensor([t for rows in batch.sequences for t in rows.tokens])
        x = weights.embedding[token_ids].float().numpy()
        sequences = [contiguous(rows.kv) for rows in batch.sequences]
        spans, positions = self._spans(batch)
        wanted = _wanted(batch, spans)
        caches = _Caches(sequences, spans)
        features = np.empty((batch.rows, len(taps) * config.hidden_size), np.float32)
        column = self._tap(features, 0, x, -1 in taps)
        eps = config.rms_norm_eps
        for index, layer in enumerate(weights.layers):
            is_last = index + 1 == len(weights.layers)
            if index == 0:
                rms_norm(x, layer.input_norm, eps, work.normed)
            layer.qkv(work.normed, work.qkv)
            for (first, last), kv in zip(spans, sequences, strict=True):
                keys, values = kv.keys[index], kv.values[index]
                at, q = positions[first:last], work.q[first:last]
                rope_append(
                    work.qkv[first:last], at, self._cos, self._sin,
                    layer.q_norm, layer.k_norm, eps, q, keys, values,
                )  # fmt: skip
            if is_last and index not in taps:
                # Of a row that no logits are wanted of, what follows its last keys is no use.
                if len(wanted) < batch.rows:
                    work, x, positions = self._only(wanted, work), x[wanted], positions[wanted]
                    ends = accumulate((rows.logits for rows in batch.sequences), initial=0)
                    caches.spans = np.array(list(pairwise(ends)), np.int64)
                if not len(x):
                    break
            attend(
                work.q, caches.spans, caches.keys_of(index), caches.values_of(index),
                caches.capacities, config.num_kv_heads, positions, work.mixed,
            )  # fmt: skip
            layer.output(work.mixed.reshape(len(x), -1), work.delta)
            add_rms_norm(x, work.delta, layer.post_norm, eps, work.normed)
            layer.gate_up(work.normed, work.gate_up)
            silu_mul(work.gate_up, work.gated)
            layer.down(work.gated, work.delta)
            following = weights.norm if is_last else weights.layers[index + 1].input_norm
            add_rms_norm(x, work.delta, following, eps, work.normed)
            column = self._tap(features, column, x, index in taps)
        logits = torch.empty((len(wanted), weights.head.channels), dtype=torch.float32)
        if len(wanted):
            normed = work.normed if len(wanted) == len(x) else work.normed[wanted]
            weights.head(normed, logits.numpy())
        return Pass(logits, torch.from_numpy(features))

    def wait(self) -> None:
        """A pass is over when :meth:`forward` returns."""

    def _tap(
        self, features: NDArray[np.float32], column: int, x: NDArray[np.float32], wanted: bool
    ) -> int:
        if not wanted:
            return column
        features[:, column : column + x.shape[1]] = x
        return column + int(x.shape[1])

    def _only(self, kept: NDArray[np.int64], work: _Workspace) -> _Workspace:
        """Buffers for the rows ``kept`` alone, with their queries."""
        narrow = self._workspace(len(kept))
        narrow.q[:] = work.q[kept]
        return narrow

    def _spans(self, batch: Batch) -> tuple[list[tuple[int, int]], NDArray[np.int64]]:
        spans, pieces, first = [], [], 0
        for rows in batch.sequences:
            count = len(rows.tokens)
            end = rows.kv.length + count
            if end > rows.kv.capacity or end > self.max_positions:
                raise ValueError(
                    f"{end} positions do not fit: room for {rows.kv.capacity} reserved, "
                    f"at most {self.max_positions}"
                )
            spans.append((first, first + count))
            pieces.append(np.arange(rows.kv.length, end, dtype=np.int64))
            first += count
        return spans, np.concatenate(pieces)

    def _workspace(self, rows: int) -> _Workspace:
        kept = self._workspaces.get(rows)
        if kept is None:
            kept = _Workspace(self.config, rows)
            if rows <= self.KEPT_ROWS:
                self._workspaces[rows] = kept
        return kept


def _wanted(batch: Batch, spans: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """The rows of ``batch`` that logits are wanted of, each sequence having those of its span."""
    pieces = [
        np.arange(last - rows.logits, last)
        for (_, last), rows in zip(spans, batch.sequences, strict=True)
    ]
    return np.concatenate(pieces)
