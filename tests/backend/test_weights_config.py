"""What a config.json says, what is refused in it, and that weights must fit it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from dspark_backend.checkpoint.config import TargetConfig
from dspark_backend.checkpoint.layout import check_tensors, tensor_shapes
from dspark_backend.errors import ModelFormatError

_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
    "eos_token_id": 2,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_defaults_of_a_sparse_config() -> None:
    config = TargetConfig.from_dict(_LLAMA)
    assert (config.num_kv_heads, config.head_dim) == (4, 16)
    assert (config.rope_theta, config.rope_scaling) == (10000.0, None)
    assert config.eos_token_ids == (2,)
    assert config.bos_token_id is None
    assert not config.tie_word_embeddings
    assert not config.attention_bias


@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen2Config, Qwen3Config])
def test_transformers_own_configs_are_read(config_class: Any) -> None:
    theirs = config_class()
    ours = TargetConfig.from_dict(theirs.to_dict())
    assert ours.family == theirs.model_type
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 5e5, "rope_scaling": _LLAMA3_ROPE},
        {"rope_parameters": {"rope_theta": 5e5, **_LLAMA3_ROPE}},
        {"rope_theta": 5e5, "rope_scaling": {**_LLAMA3_ROPE, "rope_theta": 5e5}},
    ],
    ids=["old spelling", "new spelling", "both"],
)
def test_llama3_rope_in_every_spelling(fields: dict[str, Any]) -> None:
    config = TargetConfig.from_dict(_LLAMA | fields)
    assert (config.rope_theta, config.rope_scaling) == (5e5, _LLAMA3_ROPE)


def test_qwen3_has_its_own_head_size_and_qwen2_always_has_biases() -> None:
    assert TargetConfig.from_dict(_LLAMA | {"model_type": "qwen3"}).head_dim == 128
    assert TargetConfig.from_dict(_LLAMA | {"model_type": "qwen2"}).attention_bias


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model_type": "mixtral"}, "mixtral"),
        ({"model_type": None}, "model_type"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"layer_types": 3}, "layer_types"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"num_local_experts": 8}, "num_experts"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "longrope"}}, "longrope"),
        ({"rope_scaling": {"type": ["x"]}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_scaling": "llama3"}, "rope_scaling"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": 64.0}, "hidden_size"),
        ({"hidden_size": 66}, "hidden_size"),
        ({"head_dim": 15}, "head_dim"),
        ({"num_hidden_layers": 1 << 40}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"vocab_size": True}, "vocab_size"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"bos_token_id": -1}, "bos_token_id"),
    ],
)
def test_what_the_decoder_cannot_run_is_refused_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelFormatError, match=named):
        TargetConfig.from_dict(_LLAMA | fields)


def test_generation_config_names_the_end_tokens(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(_LLAMA))
    assert TargetConfig.from_folder(tmp_path).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert TargetConfig.from_folder(tmp_path).eos_token_ids == (7, 9)


@pytest.mark.parametrize("text", [None, "{", "[]", "\ufeff"])
def test_an_unreadable_config_says_so(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelFormatError, match=r"config\.json"):
        TargetConfig.from_folder(tmp_path)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("bias", [False, True])
def test_layout_is_that_of_transformers(family: str, bias: bool) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = _LLAMA | {"attention_bias": bias, "num_key_value_heads": 2, "head_dim": 32}
    del fields["model_type"]
    if family == "qwen2":
        del fields["attention_bias"]
        fields["head_dim"] = 16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert tensor_shapes(TargetConfig.from_dict(model.config.to_dict())) == expected


def test_weights_must_fit_the_config(tiny_checkpoint: Callable[..., Path]) -> None:
    config = TargetConfig.from_folder(tiny_checkpoint("qwen3"))
    shapes = tensor_shapes(config)
    check_tensors(config, shapes, shapes.__getitem__, "it")
    wrong = shapes | {"model.norm.weight": (65,)}
    with pytest.raises(ModelFormatError, match=r"it: tensor 'model\.norm\.weight' has shape"):
        check_tensors(config, wrong, wrong.__getitem__, "it")
    del wrong["model.norm.weight"]
    with pytest.raises(ModelFormatError, match="missing"):
        check_tensors(config, wrong, wrong.__getitem__, "it")
