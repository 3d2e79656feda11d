"""The target's forward pass on a device: the decoder of ``decoder.py`` with matrix products by
torch and everything between them by the project's kernels.

The residual stream is float32; products, keys and values are of the weights' dtype.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dspark_backend.checkpoint.config import TargetConfig
from dspark_backend.kernels.norm.triton import rms_norm
from dspark_backend.kernels.ragged_attention.contract import Sight
from dspark_backend.kernels.rope.triton import Rotation
from dspark_backend.kernels.swiglu.triton import silu_mul
from dspark_backend.kv.budget import KVShape
from dspark_backend.kv.paged import paged
from dspark_backend.kv.paged_storage import PagedStorage
from dspark_backend.target.batch import Batch
from dspark_backend.target.device_linear import DeviceLinear
from dspark_backend.target.paged_rows import Layout, PagedRows, Span
from dspark_backend.target.protocol import Pass
from dspark_backend.target.rope import tables


@dataclass(frozen=True, slots=True)
class DeviceLayer:
    """One layer; norms float32 [d], ``q_norm``/``k_norm`` [hd] or None."""

    input_norm: Tensor
    qkv: DeviceLinear
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: DeviceLinear
    post_norm: Tensor
    gate_up: DeviceLinear
    down: DeviceLinear


@dataclass(frozen=True, slots=True)
class DeviceWeights:
    """A target's parameters on one device; ``embedding`` [V, d] of the products' dtype."""

    embedding: Tensor
    layers: Sequence[DeviceLayer]
    norm: Tensor
    head: DeviceLinear


class DeviceDecoder:
    """A target model where ``weights`` lie.

    ``max_positions`` bounds every sequence. Launches work and waits for none of it: what it gives
    is there when the device gets to it. Not thread-safe.
    """

    def __init__(self, config: TargetConfig, weights: DeviceWeights, max_positions: int) -> None:
        self.config = config
        self.max_positions = max_positions
        self.device = weights.embedding.device
        self.dtype = weights.embedding.dtype
        self.kv_shape = KVShape(
            config.num_layers, config.num_kv_heads, config.head_dim, self.dtype.itemsize
        )
        self.weights = weights
        cos, sin = (torch.from_numpy(t).to(self.device) for t in tables(config, max_positions))
        eps = config.rms_norm_eps
        self._rotations = [Rotation(cos, sin, w.q_norm, w.k_norm, eps) for w in weights.layers]

    def storage(self, draft: KVShape | None, limit_bytes: int) -> PagedStorage:
        """As :meth:`Target.storage`. Raises CapacityError where the device lacks the memory."""
        return PagedStorage(self.kv_shape, draft, limit_bytes, self.dtype, self.device)

    def forward(self, batch: Batch, taps: Collection[int] = ()) -> Pass:
        """As :meth:`Target.forward`."""
        return self.run(self.lay_out(batch).on(self.device), taps)

    def run(self, rows: PagedRows, taps: Collection[int]) -> Pass:
        """The pass over ``rows``, made of launches alone: what it reads of the host is their
        shape."""
        weights, eps = self.weights, self.config.rms_norm_eps
        x = functional.embedding(rows.extra["ids"], weights.embedding).float()
        tapped = [x.clone()] if -1 in taps else []
        normed = rms_norm(x, weights.layers[0].input_norm, eps, self.dtype)
        for index, layer in enumerate(weights.layers):
            mixed = rows.attend(index, layer.qkv(normed), self._rotations[index], Sight.CAUSAL)
            delta = layer.output(mixed)
            normed = rms_norm(x, layer.post_norm, eps, self.dtype, delta)
            delta = layer.down(silu_mul(layer.gate_up(normed)))
            is_last = index + 1 == len(weights.layers)
            following = weights.norm if is_last else weights.layers[index + 1].input_norm
            normed = rms_norm(x, following, eps, self.dtype, delta)
            if index in taps:
                tapped.append(x.clone())
        features = torch.cat(tapped, dim=1) if tapped else x.new_empty(len(x), 0)
        return Pass(weights.head(normed[rows.extra["wanted"]]), features)

    def wait(self) -> None:
        """Return when the device has done all that was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def lay_out(self, batch: Batch, columns: int = 1) -> Layout:
        """Where the rows of ``batch`` are, and which of them logits are wanted of. Raises
        ValueError for rows that there is no room for."""
        spans, wanted, end = [], [], 0
        for rows in batch.sequences:
            kv, count = paged(rows.kv), len(rows.tokens)
            if kv.length + count > self.max_positions:
                raise ValueError(
                    f"{kv.length + count} positions do not fit: at most {self.max_positions}"
                )
            end += count
            spans.append(Span(kv, kv.length, count))
            wanted.append(np.arange(end - rows.logits, end))
        ids = np.array([t for rows in batch.sequences for t in rows.tokens])
        return Layout.of(spans, columns, ids=ids, wanted=np.concatenate(wanted))
