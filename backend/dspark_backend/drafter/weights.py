"""A drafter's weights as the CPU runs them: int8 by the target's kernels, or floating point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import assert_never

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspark_backend.catalog.files import ModelFiles
from dspark_backend.drafter.checkpoint import DrafterFiles
from dspark_backend.drafter.config import HeadType
from dspark_backend.drafter.layout import EMBEDDING, LM_HEAD
from dspark_backend.kernels.linear.panels import pack
from dspark_backend.kernels.linear.reference import quantise_weight
from dspark_backend.target.linear import Int8Linear, Linear, TorchLinear
from dspark_backend.target.precision import Precision

_NONE = np.zeros(0, np.float32)


@dataclass(frozen=True, slots=True)
class DraftLayer:
    """One layer. ``qkv`` reads the block, ``kv`` (the same rows of it) the context; norms float32,
    [0] where the family has none."""

    input_norm: NDArray[np.float32]
    qkv: Linear
    kv: Linear
    q_norm: NDArray[np.float32]
    k_norm: NDArray[np.float32]
    output: Linear
    post_norm: NDArray[np.float32]
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class SequentialWeights:
    """The Markov head: ``w1`` [V, r] of any float dtype, ``w2`` r -> D; ``inner`` is the gate's or
    the recurrence's projection, None for the vanilla head."""

    w1: Tensor
    w2: Linear
    inner: Linear | None


@dataclass(frozen=True, slots=True)
class DraftWeights:
    """``embedding`` [V, d] is the target's; ``head`` speaks the draft vocabulary; ``confidence``
    is the vector float32 [d or d + r] and ``confidence_bias`` its bias, None without that head."""

    embedding: Tensor
    fc: Linear
    hidden_norm: NDArray[np.float32]
    layers: tuple[DraftLayer, ...]
    norm: NDArray[np.float32]
    head: Linear
    sequential: SequentialWeights | None
    confidence: NDArray[np.float32] | None
    confidence_bias: float


def load_weights(files: DrafterFiles, target: ModelFiles, precision: Precision) -> DraftWeights:
    """Assemble the weights of ``files`` for ``target``.

    Matrices run in ``precision``, but for ``fc``, which always runs in bfloat16: it reads the
    target's residual stream, whose outliers an int8 weight's rounding would blow up.
    """
    make = _maker(precision)
    config = files.config
    store = target.tensors()
    embedding = store.get("model.embed_tokens.weight")
    head = embedding if target.config.tie_word_embeddings else store.get("lm_head.weight")
    rows = head if files.d2t is None else head[files.d2t]
    if files.has_target_copies:
        embedding, rows = files.get(EMBEDDING).bfloat16(), files.get(LM_HEAD)
    sequential = None
    if config.head is not HeadType.NONE:
        sequential = SequentialWeights(
            files.get("markov_head.markov_w1.weight").bfloat16(),
            make(files.get("markov_head.markov_w2.weight"), None),
            _inner(files, make),
        )
    return DraftWeights(
        embedding=embedding,
        fc=TorchLinear(files.get("fc.weight").bfloat16(), None),
        hidden_norm=files.get("hidden_norm.weight").numpy(),
        layers=tuple(_layer(files, i, make) for i in range(config.shape.num_layers)),
        norm=files.get("norm.weight").numpy(),
        head=make(rows.float(), None),
        sequential=sequential,
        confidence=(
            files.get("confidence_head.proj.weight")[0].numpy() if config.confidence else None
        ),
        confidence_bias=(
            float(files.get("confidence_head.proj.bias")[0]) if config.confidence else 0.0
        ),
    )


_Make = Callable[[Tensor, Tensor | None], Linear]


def _layer(files: DrafterFiles, index: int, make: _Make) -> DraftLayer:
    prefix = f"layers.{index}."
    shape = files.config.shape
    attention = prefix + "self_attn."
    normed = shape.family == "qwen3"

    def linear(*names: str) -> Linear:
        weight = torch.cat([files.get(f"{name}.weight") for name in names])
        bias = None
        if "self_attn" in names[0] and shape.attention_bias:
            biased = shape.family != "qwen2" or not names[0].endswith("o_proj")
            bias = torch.cat([files.get(f"{name}.bias") for name in names]) if biased else None
        return make(weight, bias)

    return DraftLayer(
        input_norm=files.get(prefix + "input_layernorm.weight").numpy(),
        qkv=linear(*(f"{attention}{n}_proj" for n in "qkv")),
        kv=linear(*(f"{attention}{n}_proj" for n in "kv")),
        q_norm=files.get(attention + "q_norm.weight").numpy() if normed else _NONE,
        k_norm=files.get(attention + "k_norm.weight").numpy() if normed else _NONE,
        output=linear(attention + "o_proj"),
        post_norm=files.get(prefix + "post_attention_layernorm.weight").numpy(),
        gate_up=linear(prefix + "mlp.gate_proj", prefix + "mlp.up_proj"),
        down=linear(prefix + "mlp.down_proj"),
    )


def _inner(files: DrafterFiles, make: _Make) -> Linear | None:
    names = {HeadType.GATED: "gate_proj", HeadType.RNN: "joint_proj"}
    name = names.get(files.config.head)
    if name is None:
        return None
    prefix = f"markov_head.{name}"
    return make(files.get(prefix + ".weight"), files.get(prefix + ".bias"))


def _maker(precision: Precision) -> _Make:
    def floating(weight: Tensor, bias: Tensor | None) -> Linear:
        dtype = torch.bfloat16 if precision is Precision.BF16 else torch.float32
        return TorchLinear(weight.to(dtype), bias)

    def int8(weight: Tensor, bias: Tensor | None) -> Linear:
        q, scale = quantise_weight(weight)
        sums = q.sum(dim=1, dtype=torch.int32)
        added = None if bias is None else bias.float().numpy()
        planes = 1 if precision is Precision.INT8 else 2
        return Int8Linear(pack(q).numpy(), scale.numpy(), sums.numpy(), added, planes)

    match precision:
        case Precision.BF16 | Precision.FP32:
            return floating
        case Precision.INT8 | Precision.INT8X16:
            return int8
        case _:
            assert_never(precision)
