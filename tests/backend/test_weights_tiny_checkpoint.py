"""The suite's tiny checkpoints load here and in transformers, with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dspark_backend.catalog import resolve


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("shards", [1, 3])
def test_transformers_loads_the_same_weights(
    tiny_checkpoint: Callable[..., Path], family: str, shards: int
) -> None:
    folder = tiny_checkpoint(family, shards=shards)
    store = resolve(str(folder)).tensors()
    oracle = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert set(oracle) == set(store.names())
    assert all(torch.equal(oracle[name], store.get(name)) for name in store.names())


def test_transformers_reads_the_same_tokenizer(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("qwen3")
    ours, oracle = resolve(str(folder)).tokenizer(), AutoTokenizer.from_pretrained(folder)
    text = 'def f(x):\n    return "é∂🙂"<tool_call><|im_end|>'
    assert ours.encode(text) == oracle.encode(text, add_special_tokens=False)
    assert ours.decode(ours.encode(text)) == text
    assert ours.vocab_size <= 512
