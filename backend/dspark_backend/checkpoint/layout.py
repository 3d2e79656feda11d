"""Which tensors a decoder of each family has, under Hugging Face names, and their shapes."""

from __future__ import annotations

from collections.abc import Callable, Collection

from dspark_backend.checkpoint.config import TargetConfig
from dspark_backend.errors import ModelFormatError


def tensor_shapes(config: TargetConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of this config must hold, with its shape."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        for name, size in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            shapes[f"{attention}{name}.weight"] = (size, hidden)
            if config.attention_bias:
                shapes[f"{attention}{name}.bias"] = (size,)
        shapes[attention + "o_proj.weight"] = (hidden, queries)
        if config.attention_bias and config.family != "qwen2":
            shapes[attention + "o_proj.bias"] = (hidden,)
        if config.family == "qwen3":
            shapes[attention + "q_norm.weight"] = (config.head_dim,)
            shapes[attention + "k_norm.weight"] = (config.head_dim,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        shapes[mlp + "gate_proj.weight"] = (inner, hidden)
        shapes[mlp + "up_proj.weight"] = (inner, hidden)
        shapes[mlp + "down_proj.weight"] = (hidden, inner)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def check_tensors(
    config: TargetConfig,
    names: Collection[str],
    shape_of: Callable[[str], tuple[int, ...]],
    source: object,
) -> None:
    """Hold what a checkpoint has against what its config promises; extra tensors are ignored.

    Raises:
        ModelFormatError: a tensor is missing or has another shape; names it and ``source``.
    """
    present = frozenset(names)
    for name, shape in tensor_shapes(config).items():
        if name not in present:
            raise ModelFormatError(f"{source}: tensor {name!r} is missing")
        if shape_of(name) != shape:
            raise ModelFormatError(
                f"{source}: tensor {name!r} has shape {shape_of(name)}, its config says {shape}"
            )
