"""From a checkpoint on disk to a decoder, in a given precision."""

from __future__ import annotations

from typing import assert_never

import numpy as np
import torch
from numpy.typing import NDArray

from dspark_backend.catalog.files import ModelFiles
from dspark_backend.checkpoint.config import TargetConfig
from dspark_backend.checkpoint.progress import ProgressSink
from dspark_backend.checkpoint.safetensors import TensorStore
from dspark_backend.target.decoder import NO_WEIGHT, Decoder, Layer, Weights
from dspark_backend.target.linear import Int8Linear, Linear, TorchLinear
from dspark_backend.target.precision import Precision
from dspark_backend.target.quantised import Fused, fused_linears, open_quantised


def load_decoder(
    files: ModelFiles,
    precision: Precision,
    max_positions: int,
    progress: ProgressSink | None = None,
) -> Decoder:
    """Map the weights and assemble the decoder; nothing is read before it is needed.

    Raises:
        ModelFormatError: weights that do not fit the config.
    """
    store = files.tensors()
    match precision:
        case Precision.BF16 | Precision.FP32:
            dtype = torch.bfloat16 if precision is Precision.BF16 else torch.float32
            linears: dict[str, Linear] = {
                f.name: _floating(store, f, dtype) for f in fused_linears(files.config)
            }
        case Precision.INT8 | Precision.INT8X16:
            quantised = open_quantised(files, progress)
            planes = 1 if precision is Precision.INT8 else 2
            linears = {
                f.name: _int8(store, quantised, f, planes) for f in fused_linears(files.config)
            }
        case _:
            assert_never(precision)
    weights = Weights(
        embedding=store.get("model.embed_tokens.weight"),
        layers=[_layer(files.config, store, linears, i) for i in range(files.config.num_layers)],
        norm=_vector(store, "model.norm.weight"),
        head=linears["head"],
    )
    return Decoder(files.config, weights, max_positions)


def _layer(
    config: TargetConfig, store: TensorStore, linears: dict[str, Linear], index: int
) -> Layer:
    prefix = f"model.layers.{index}."
    normalised_heads = config.family == "qwen3"
    attention = prefix + "self_attn."
    return Layer(
        input_norm=_vector(store, prefix + "input_layernorm.weight"),
        qkv=linears[prefix + "qkv"],
        q_norm=_vector(store, attention + "q_norm.weight") if normalised_heads else NO_WEIGHT,
        k_norm=_vector(store, attention + "k_norm.weight") if normalised_heads else NO_WEIGHT,
        output=linears[prefix + "output"],
        post_norm=_vector(store, prefix + "post_attention_layernorm.weight"),
        gate_up=linears[prefix + "gate_up"],
        down=linears[prefix + "down"],
    )


def _int8(store: TensorStore, quantised: TensorStore, linear: Fused, planes: int) -> Int8Linear:
    return Int8Linear(
        quantised.get(linear.name).numpy(),
        quantised.get(f"{linear.name}.scale").numpy(),
        quantised.get(f"{linear.name}.sums").to(torch.int32).numpy(),
        _bias(store, linear),
        planes,
    )


def _floating(store: TensorStore, linear: Fused, dtype: torch.dtype) -> TorchLinear:
    parts = [store.get(part).to(dtype) for part in linear.parts]
    bias = _bias(store, linear)
    weight = parts[0] if len(parts) == 1 else torch.cat(parts)
    return TorchLinear(weight, None if bias is None else torch.from_numpy(bias))


def _bias(store: TensorStore, linear: Fused) -> NDArray[np.float32] | None:
    names = [part.removesuffix(".weight") + ".bias" for part in linear.parts]
    if not all(name in store for name in names):
        return None
    return np.concatenate([_vector(store, name) for name in names])


def _vector(store: TensorStore, name: str) -> NDArray[np.float32]:
    values: NDArray[np.float32] = store.get(name).float().numpy()
    return values
