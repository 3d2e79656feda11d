"""The conversion of a published GGUF file against transformers, which reads it on its own."""

from __future__ import annotations

import pytest
import torch

from dspark_backend.catalog import ModelFiles


@pytest.mark.real_model
def test_smollm2_has_the_published_shape(smollm2_files: ModelFiles) -> None:
    config = smollm2_files.config
    assert (config.family, config.num_layers, config.hidden_size) == ("llama", 30, 576)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (9, 3, 64)
    assert (config.rope_theta, config.rms_norm_eps) == (100000.0, 1e-5)
    assert config.tie_word_embeddings
    assert config.eos_token_ids == (2, 0)


@pytest.mark.slow
def test_smollm2_weights_are_those_of_transformers(smollm2_files: ModelFiles) -> None:
    from transformers import AutoModelForCausalLM

    assert smollm2_files.gguf is not None
    oracle = AutoModelForCausalLM.from_pretrained(
        smollm2_files.gguf.parent, gguf_file=smollm2_files.gguf.name, dtype=torch.float32
    ).state_dict()
    store = smollm2_files.tensors()
    for name in store.names():
        assert torch.equal(oracle[name].bfloat16(), store.get(name)), name
