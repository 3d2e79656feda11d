"""Which tensors a drafter's checkpoint holds, under the published names, and their shapes."""

from __future__ import annotations

from dspark_backend.drafter.config import DrafterConfig, HeadType

EMBEDDING, LM_HEAD, D2T = "embed_tokens.weight", "lm_head.weight", "d2t"

Shapes = dict[str, tuple[int, ...]]


def trained_shapes(config: DrafterConfig) -> Shapes:
    """Every tensor of the drafter itself: all of them must be there."""
    hidden = config.shape.hidden_size
    shapes: Shapes = {
        "fc.weight": (hidden, config.feature_size),
        "hidden_norm.weight": (hidden,),
        "norm.weight": (hidden,),
    }
    for layer in range(config.shape.num_layers):
        shapes |= _layer_shapes(config, f"layers.{layer}.")
    return shapes | _head_shapes(config)


def optional_shapes(config: DrafterConfig) -> Shapes:
    """Frozen copies of the target's tensors; the target's own are used where they are absent."""
    vocab, hidden = config.shape.vocab_size, config.shape.hidden_size
    return {EMBEDDING: (vocab, hidden), LM_HEAD: (config.output_size, hidden)}


def _layer_shapes(config: DrafterConfig, prefix: str) -> Shapes:
    shape = config.shape
    hidden, inner = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    shapes: Shapes = {
        f"{prefix}input_layernorm.weight": (hidden,),
        f"{prefix}post_attention_layernorm.weight": (hidden,),
        f"{prefix}self_attn.o_proj.weight": (hidden, queries),
        f"{prefix}mlp.gate_proj.weight": (inner, hidden),
        f"{prefix}mlp.up_proj.weight": (inner, hidden),
        f"{prefix}mlp.down_proj.weight": (hidden, inner),
    }
    for name, size in (("q", queries), ("k", keys), ("v", keys)):
        shapes[f"{prefix}self_attn.{name}_proj.weight"] = (size, hidden)
        if shape.attention_bias:
            shapes[f"{prefix}self_attn.{name}_proj.bias"] = (size,)
    if shape.attention_bias and shape.family != "qwen2":
        shapes[f"{prefix}self_attn.o_proj.bias"] = (hidden,)
    if shape.family == "qwen3":
        shapes[f"{prefix}self_attn.q_norm.weight"] = (shape.head_dim,)
        shapes[f"{prefix}self_attn.k_norm.weight"] = (shape.head_dim,)
    return shapes


def _head_shapes(config: DrafterConfig) -> Shapes:
    hidden, rank = config.shape.hidden_size, config.markov_rank
    shapes: Shapes = {}
    if config.head is not HeadType.NONE:
        shapes["markov_head.markov_w1.weight"] = (config.shape.vocab_size, rank)
        shapes["markov_head.markov_w2.weight"] = (config.output_size, rank)
    if config.head is HeadType.GATED:
        shapes["markov_head.gate_proj.weight"] = (rank, hidden + rank)
        shapes["markov_head.gate_proj.bias"] = (rank,)
    if config.head is HeadType.RNN:
        shapes["markov_head.joint_proj.weight"] = (3 * rank, 2 * rank + hidden)
        shapes["markov_head.joint_proj.bias"] = (3 * rank,)
    if config.confidence:
        shapes["confidence_head.proj.weight"] = (1, config.confidence_size)
        shapes["confidence_head.proj.bias"] = (1,)
    return shapes
