"""Fixtures for the whole suite: the real small model, and tiny checkpoints of every family."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dspark_backend.catalog import ModelFiles, resolve
from dspark_backend.catalog.files import folder_identity
from dspark_backend.catalog.home import delete, derived_folders
from dspark_backend.checkpoint.config import TargetConfig
from dspark_backend.checkpoint.layout import tensor_shapes

TinyCheckpoint = Callable[..., Path]

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_TOOL_TOKENS = ["<tool_call>", "</tool_call>"]
_TRAINING_TEXT = [
    "def add(a, b):\n    return a + b\n\nclass Point:\n    x: int\n    y: int\n",
    '{"name": "read_file", "arguments": {"path": "main.py", "line": 12}}',
    "The quick brown fox jumps over the lazy dog. You are a helpful assistant.",
]

_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n'"
    " + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_HERMES = (
    "{% if tools %}{{ '<|im_start|>system\\n# Tools\\n<tools>' }}"
    "{% for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}"
    "{{ '\\n</tools><|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message.content %}{{ message.content }}{% endif %}"
    "{% for call in message.tool_calls or [] %}"
    '{{ \'\\n<tool_call>\\n{"name": "\' + call.function.name + \'", "arguments": \''
    " + (call.function.arguments | tojson) + '}\\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def pytest_configure() -> None:
    """Device kernels run under Triton's interpreter where there is no GPU. Triton reads this when
    it is first imported, so it is set before any test module is."""
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    # For the processes of -n, which begin after this: threads that wait must not spin on the core
    # that another process works on.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Every ``@pytest.mark.anyio`` test runs on both event loops."""
    return str(request.param)


@pytest.fixture(scope="session")
def smollm2_files() -> ModelFiles:
    """SmolLM2-135M, fetched on first use and converted once."""
    return resolve("smollm2-135m")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyCheckpoint]:
    """Makes checkpoint folders with random weights, which transformers loads too.

    ``tiny_checkpoint("qwen3", num_hidden_layers=3)``: the family, then any field of its
    ``config.json``; ``seed`` and ``dtype`` choose the weights, ``shards`` the number of files.
    The same arguments give the same folder, so do not write into it.
    """
    made: dict[str, Path] = {}

    def make(
        family: str = "llama",
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.bfloat16,
        shards: int = 1,
        **fields: Any,
    ) -> Path:
        config = _config(family, fields)
        key = json.dumps([config, seed, str(dtype), shards], sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp(f"tiny-{family}")
            _write_tokenizer(folder, family)
            _write_json(folder / "config.json", config | {"dtype": str(dtype).split(".")[1]})
            _write_weights(folder, _weights(TargetConfig.from_dict(config), seed, dtype), shards)
            made[key] = folder
        return made[key]

    yield make
    # Loading one leaves its quantised form and its cost in the user's cache: they go with it.
    for folder in made.values():
        for derived in derived_folders(folder_identity(folder)):
            delete(derived)


def _config(family: str, fields: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": family,
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 512,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": [2, 0],
    }
    return config | fields


def _weights(config: TargetConfig, seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Random, but scaled like a trained model's, so that logits differ well between tokens."""
    generator = torch.Generator().manual_seed(seed)

    def weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        noise = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight"):
            return 1 + 0.1 * noise
        if name.endswith("bias"):
            return 0.1 * noise
        return noise if "embed" in name else noise / math.sqrt(shape[-1])

    return {name: weight(name, shape).to(dtype) for name, shape in tensor_shapes(config).items()}


def _write_weights(folder: Path, weights: dict[str, torch.Tensor], shards: int) -> None:
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    weight_map = {name: names[i % shards] for i, name in enumerate(weights)}
    index = {"metadata": {}, "weight_map": weight_map}
    for shard in names:
        part = {name: weights[name] for name, place in weight_map.items() if place == shard}
        save_file(part, folder / shard, metadata={"format": "pt"})
    _write_json(folder / "model.safetensors.index.json", index)


def _write_tokenizer(folder: Path, family: str) -> None:
    """A byte-level tokenizer of fewer than 512 tokens: ChatML, and Hermes tools for Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=_SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TRAINING_TEXT, trainer)
    if family != "llama":
        tokenizer.add_tokens(_TOOL_TOKENS)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "chat_template": _CHATML if family == "llama" else _HERMES,
    }
    _write_json(folder / "tokenizer_config.json", settings)
    _write_json(folder / "generation_config.json", {"eos_token_id": [2, 0], "bos_token_id": 0})


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document), encoding="utf-8")
