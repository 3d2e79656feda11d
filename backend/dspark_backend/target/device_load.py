"""From a checkpoint on disk to a decoder on a device."""

from __future__ import annotations

import torch
from torch import Tensor

from dspark_backend.catalog.files import ModelFiles
from dspark_backend.checkpoint.config import TargetConfig
from dspark_backend.checkpoint.safetensors import TensorStore
from dspark_backend.target.device import DeviceDecoder, DeviceLayer, DeviceWeights
from dspark_backend.target.device_linear import DeviceLinear
from dspark_backend.target.quantised import Fused, fused_linears


def load_device_decoder(
    files: ModelFiles, dtype: torch.dtype, max_positions: int, device: torch.device
) -> DeviceDecoder:
    """Read the weights to ``device`` as ``dtype`` (bfloat16 or float32) and assemble the decoder.

    Raises:
        ModelFormatError: weights that do not fit the config.
    """
    reader = _Reader(files.tensors(), dtype, device)
    config = files.config
    linears = {fused.name: reader.linear(fused) for fused in fused_linears(config)}
    head = linears["head"]
    tied = config.tie_word_embeddings
    weights = DeviceWeights(
        embedding=head.weight if tied else reader.matrix("model.embed_tokens.weight"),
        layers=[_layer(config, reader, linears, i) for i in range(config.num_layers)],
        norm=reader.vector("model.norm.weight"),
        head=head,
    )
    return DeviceDecoder(config, weights, max_positions)


class _Reader:
    """Tensors of a checkpoint, on the device."""

    def __init__(self, store: TensorStore, dtype: torch.dtype, device: torch.device) -> None:
        self._store, self._dtype, self._device = store, dtype, device

    def matrix(self, *names: str) -> Tensor:
        """The matrices one below the other, [N, K]."""
        parts = [self._store.get(name).to(self._device, self._dtype) for name in names]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def vector(self, name: str) -> Tensor:
        return self._store.get(name).to(self._device, torch.float32)

    def linear(self, fused: Fused) -> DeviceLinear:
        names = [part.removesuffix(".weight") + ".bias" for part in fused.parts]
        biased = all(name in self._store for name in names)
        bias = torch.cat([self.vector(name) for name in names]) if biased else None
        weight = self.matrix(*fused.parts)
        return DeviceLinear(weight, None if bias is None else bias.to(self._dtype))


def _layer(
    config: TargetConfig, reader: _Reader, linears: dict[str, DeviceLinear], index: int
) -> DeviceLayer:
    prefix = f"model.layers.{index}."
    attention = prefix + "self_attn."
    normed = config.family == "qwen3"
    return DeviceLayer(
        input_norm=reader.vector(prefix + "input_layernorm.weight"),
        qkv=linears[prefix + "qkv"],
        q_norm=reader.vector(attention + "q_norm.weight") if normed else None,
        k_norm=reader.vector(attention + "k_norm.weight") if normed else None,
        output=linears[prefix + "output"],
        post_norm=reader.vector(prefix + "post_attention_layernorm.weight"),
        gate_up=linears[prefix + "gate_up"],
        down=linears[prefix + "down"],
    )
