"""A drafter's weights on the device of its target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark_backend.drafter.checkpoint import DrafterFiles
from dspark_backend.drafter.config import HeadType
from dspark_backend.drafter.layout import EMBEDDING, LM_HEAD
from dspark_backend.target.device import DeviceWeights
from dspark_backend.target.device_linear import DeviceLinear


@dataclass(frozen=True, slots=True)
class DeviceDraftLayer:
    """One layer. ``qkv`` reads the block, ``kv`` (the same rows of it) the context; norms float32,
    None where the family has none."""

    input_norm: Tensor
    qkv: DeviceLinear
    kv: DeviceLinear
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: DeviceLinear
    post_norm: Tensor
    gate_up: DeviceLinear
    down: DeviceLinear


@dataclass(frozen=True, slots=True)
class DeviceSequential:
    """The Markov head: ``w1`` [V, r], ``w2`` r -> D; ``inner`` is the gate's or the recurrence's
    projection, None for the vanilla head."""

    w1: Tensor
    w2: DeviceLinear
    inner: DeviceLinear | None


@dataclass(frozen=True, slots=True)
class DeviceDraftWeights:
    """``embedding`` [V, d] is the target's; ``head`` speaks the draft vocabulary, whose target ids
    are ``ids`` int64 [D]; ``confidence`` is the vector float64 [d or d + r] and
    ``confidence_bias`` its bias, None without that head."""

    embedding: Tensor
    fc: DeviceLinear
    hidden_norm: Tensor
    layers: Sequence[DeviceDraftLayer]
    norm: Tensor
    head: DeviceLinear
    ids: Tensor
    sequential: DeviceSequential | None
    confidence: Tensor | None
    confidence_bias: float


def load_device_weights(files: DrafterFiles, target: DeviceWeights) -> DeviceDraftWeights:
    """The weights of ``files`` beside those of the target, in its dtype; the target's own embedding
    and head are used where the checkpoint has no copies."""
    reader = _Reader(files, target.embedding.dtype, target.embedding.device)
    config = files.config
    d2t = files.d2t
    ids = torch.arange(config.output_size) if d2t is None else d2t
    ids = ids.to(target.embedding.device)
    embedding, rows = target.embedding, target.head.weight
    if files.has_target_copies:
        embedding, rows = reader.matrix(EMBEDDING), reader.matrix(LM_HEAD)
    elif d2t is not None:
        rows = rows[ids]
    sequential = None
    if config.head is not HeadType.NONE:
        names = {HeadType.GATED: "gate_proj", HeadType.RNN: "joint_proj"}
        inner = names.get(config.head)
        sequential = DeviceSequential(
            reader.matrix("markov_head.markov_w1.weight"),
            reader.linear("markov_head.markov_w2"),
            None if inner is None else reader.linear(f"markov_head.{inner}", biased=True),
        )
    confidence, bias = None, 0.0
    if config.confidence:
        confidence = reader.vector("confidence_head.proj.weight")[0].double()
        bias = float(files.get("confidence_head.proj.bias")[0])
    return DeviceDraftWeights(
        embedding=embedding,
        fc=reader.linear("fc"),
        hidden_norm=reader.vector("hidden_norm.weight"),
        layers=[_layer(reader, files, i) for i in range(config.shape.num_layers)],
        norm=reader.vector("norm.weight"),
        head=DeviceLinear(rows, None),
        ids=ids,
        sequential=sequential,
        confidence=confidence,
        confidence_bias=bias,
    )


class _Reader:
    """Tensors of a drafter, on the device."""

    def __init__(self, files: DrafterFiles, dtype: torch.dtype, device: torch.device) -> None:
        self._files, self._dtype, self._device = files, dtype, device

    def matrix(self, *names: str) -> Tensor:
        parts = [self._files.get(name).to(self._device, self._dtype) for name in names]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def vector(self, name: str) -> Tensor:
        return self._files.get(name).to(self._device, torch.float32)

    def linear(self, *names: str, biased: bool = False) -> DeviceLinear:
        weight = self.matrix(*(f"{name}.weight" for name in names))
        bias = self.matrix(*(f"{name}.bias" for name in names)) if biased else None
        return DeviceLinear(weight, bias)


def _layer(reader: _Reader, files: DrafterFiles, index: int) -> DeviceDraftLayer:
    shape = files.config.shape
    prefix = f"layers.{index}."
    attention, mlp = prefix + "self_attn.", prefix + "mlp."
    normed, biased = shape.family == "qwen3", shape.attention_bias
    return DeviceDraftLayer(
        input_norm=reader.vector(prefix + "input_layernorm.weight"),
        qkv=reader.linear(*(f"{attention}{n}_proj" for n in "qkv"), biased=biased),
        kv=reader.linear(*(f"{attention}{n}_proj" for n in "kv"), biased=biased),
        q_norm=reader.vector(attention + "q_norm.weight") if normed else None,
        k_norm=reader.vector(attention + "k_norm.weight") if normed else None,
        output=reader.linear(attention + "o_proj", biased=biased and shape.family != "qwen2"),
        post_norm=reader.vector(prefix + "post_attention_layernorm.weight"),
        gate_up=reader.linear(mlp + "gate_proj", mlp + "up_proj"),
        down=reader.linear(mlp + "down_proj"),
    )
