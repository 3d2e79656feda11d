"""A GGUF file's metadata as the ``config.json`` and tensor names of a Hugging Face checkpoint."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from dspark_backend.checkpoint.config import FAMILIES
from dspark_backend.checkpoint.gguf import GGUFFile
from dspark_backend.errors import ModelFormatError

_ARCHITECTURES: Mapping[str, str] = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_OUTER_NAMES: Mapping[str, str] = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES: Mapping[str, str] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_TENSOR = re.compile(r"blk\.(\d{1,4})\.(\w+)\.(weight|bias)")
ROPE_FREQUENCIES = "rope_freqs.weight"


def hub_name(file: GGUFFile, name: str) -> str:
    """The Hugging Face name of a GGUF tensor.

    Raises:
        ModelFormatError: the supported families have no such tensor.
    """
    if name in _OUTER_NAMES:
        return _OUTER_NAMES[name]
    match = _LAYER_TENSOR.fullmatch(name)
    if match is None or match[2] not in _LAYER_NAMES:
        raise ModelFormatError(f"{file.path}: tensor {name!r} belongs to no supported model family")
    return f"model.layers.{int(match[1])}.{_LAYER_NAMES[match[2]]}.{match[3]}"


def model_config(file: GGUFFile) -> dict[str, Any]:
    """The file's hyper-parameters as a ``config.json``, without its token ids.

    Raises:
        ModelFormatError: an architecture or an option that this engine does not run.
    """
    family = file.metadata.get("general.architecture")
    if family not in FAMILIES:
        raise ModelFormatError(
            f"{file.path}: architecture {family!r} is not supported; known are "
            + ", ".join(FAMILIES)
        )
    if file.metadata.get("split.count", 1) != 1:
        raise ModelFormatError(f"{file.path}: one part of a split GGUF file; merge the parts first")
    if file.metadata.get(f"{family}.expert_count", 0):
        raise ModelFormatError(f"{file.path}: {family}.expert_count: expert models do not run here")
    heads = _integer(file, f"{family}.attention.head_count")
    hidden = _integer(file, f"{family}.embedding_length")
    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": family,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": _integer(file, f"{family}.feed_forward_length"),
        "num_hidden_layers": _integer(file, f"{family}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _integer(file, f"{family}.attention.head_count_kv", heads),
        "head_dim": _integer(file, f"{family}.attention.key_length", hidden // max(heads, 1)),
        "max_position_embeddings": _integer(file, f"{family}.context_length"),
        "rms_norm_eps": _real(file, f"{family}.attention.layer_norm_rms_epsilon"),
        "rope_theta": _real(file, f"{family}.rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "vocab_size": _rows(file, "token_embd.weight"),
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "dtype": "bfloat16",
    }
    if family == "qwen2":
        config["use_sliding_window"] = False
        del config["attention_bias"]  # the family always has it
    rotary = _integer(file, f"{family}.rope.dimension_count", config["head_dim"])
    if rotary != config["head_dim"]:
        raise ModelFormatError(
            f"{file.path}: RoPE over {rotary} of {config['head_dim']} dimensions is not supported"
        )
    scaling = _rope_scaling(file, family, config)
    if scaling is not None:
        config["rope_scaling"] = scaling
    return config


def _rope_scaling(file: GGUFFile, family: str, config: dict[str, Any]) -> dict[str, Any] | None:
    """Linear scaling is in the metadata; Llama 3's is a tensor of divisors, recognised here."""
    if ROPE_FREQUENCIES in file.tensors:
        return _llama3_scaling(file, config)
    kind = file.metadata.get(f"{family}.rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind != "linear":
        raise ModelFormatError(f"{file.path}: RoPE scaling {kind!r} is not supported")
    return {"rope_type": "linear", "factor": _real(file, f"{family}.rope.scaling.factor")}


def _llama3_scaling(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    """The parameters whose divisors are those in the file (Llama 3.1's, with the file's factor)."""
    tensor = file.tensors[ROPE_FREQUENCIES]
    if tensor.shape != (config["head_dim"] // 2,):
        raise ModelFormatError(f"{file.path}: {ROPE_FREQUENCIES} has shape {tensor.shape}")
    divisors = file.read(tensor, slice(None)).reshape(-1).double()
    scaling = {
        "rope_type": "llama3",
        "factor": float(divisors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    exponent = torch.arange(0, config["head_dim"], 2, dtype=torch.float64) / config["head_dim"]
    turns = 8192 / (2 * math.pi * config["rope_theta"] ** exponent)
    smooth = ((turns - 1.0) / (4.0 - 1.0)).clamp(0.0, 1.0)
    expected = 1.0 / ((1.0 - smooth) / scaling["factor"] + smooth)
    if not torch.allclose(divisors, expected, rtol=1e-3):
        raise ModelFormatError(f"{file.path}: {ROPE_FREQUENCIES} is not Llama 3's RoPE scaling")
    return scaling


def _rows(file: GGUFFile, name: str) -> int:
    if name not in file.tensors:
        raise ModelFormatError(f"{file.path}: tensor {name!r} is missing")
    return file.tensors[name].rows


def _integer(file: GGUFFile, key: str, default: int | None = None) -> int:
    value = file.metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ModelFormatError(f"{file.path}: {key} = {value!r} is not an integer")
    return value


def _real(file: GGUFFile, key: str, default: float | None = None) -> float:
    """A float32 of the file as the shortest decimal that means it: 1e-05, not 9.99999974e-06."""
    value = file.metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ModelFormatError(f"{file.path}: {key} = {value!r} is not a number")
    return float(str(np.float32(value)))
