"""GGUF to a Hugging Face checkpoint folder: bf16 safetensors, config and tokenizer; done once."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dspark_backend.checkpoint.config import TargetConfig
from dspark_backend.checkpoint.gguf import GGUFFile, GGUFTensor
from dspark_backend.checkpoint.gguf_config import ROPE_FREQUENCIES, hub_name, model_config
from dspark_backend.checkpoint.gguf_tokenizer import tokenizer_files
from dspark_backend.checkpoint.layout import check_tensors, tensor_shapes
from dspark_backend.checkpoint.safetensors import SafetensorsWriter
from dspark_backend.tokenizer import Tokenizer

# Elements de-quantised at once: 4 MiB of float32, so that memory stays flat whatever the model.
_CHUNK_ELEMENTS = 1 << 20
_THREADS = 2


def convert_gguf(
    source: Path, target: Path, on_bytes: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Write ``source`` (a GGUF file) into the empty folder ``target`` as a checkpoint.

    Weights are de-quantised and rounded to bf16; ``on_bytes(done, total)`` counts written bytes.
    The result loads in transformers too.

    Raises:
        ModelFormatError: the file is damaged or holds a model that this engine does not run.
    """
    file = GGUFFile(source)
    try:
        config = model_config(file)
        documents = tokenizer_files(file, config["max_position_embeddings"])
        config |= documents["generation_config.json"]
        for name, document in {**documents, "config.json": config}.items():
            _write_json(target / name, document)
        Tokenizer(target)  # loads, or says what is wrong, before the long work
        _write_weights(file, TargetConfig.from_dict(config), target, on_bytes)
    finally:
        file.close()


def _write_weights(
    file: GGUFFile, config: TargetConfig, target: Path, on_bytes: Callable[[int, int], None]
) -> None:
    tensors = {hub_name(file, n): t for n, t in file.tensors.items() if n != ROPE_FREQUENCIES}
    check_tensors(config, tensors, lambda name: tensors[name].shape, file.path)
    shapes = tensor_shapes(config)
    total = 2 * sum(math.prod(shape) for shape in shapes.values())
    done = 0
    with (
        SafetensorsWriter(
            target / "model.safetensors", list(shapes.items()), torch.bfloat16
        ) as out,
        ThreadPoolExecutor(_THREADS) as pool,
    ):
        for name in shapes:
            tensor = tensors[name]
            for rows in _chunks(file, tensor, _row_order(config, name, tensor), pool):
                out.append(rows)
                done += rows.nbytes
                on_bytes(done, total)


def _chunks(
    file: GGUFFile, tensor: GGUFTensor, order: np.ndarray | None, pool: ThreadPoolExecutor
) -> Iterator[torch.Tensor]:
    """The tensor as bf16 in its final order, a few rows at a time; numpy runs in parallel."""
    if len(tensor.shape) == 1:
        vector = file.read(tensor, slice(None)).reshape(-1).bfloat16()
        yield vector if order is None else vector[torch.from_numpy(order)]
        return

    def read(start: int) -> torch.Tensor:
        rows = slice(start, start + step)
        return file.read(tensor, rows if order is None else order[rows]).bfloat16()

    step = max(16, _CHUNK_ELEMENTS // tensor.shape[-1] // 16 * 16)
    starts = range(0, tensor.rows, step)
    for window in range(0, len(starts), _THREADS):
        yield from pool.map(read, starts[window : window + _THREADS])
        file.release(tensor)


def _row_order(config: TargetConfig, name: str, tensor: GGUFTensor) -> np.ndarray | None:
    """GGUF interleaves the two RoPE halves of Llama's q and k; this order takes them apart."""
    if config.family != "llama" or not (".q_proj." in name or ".k_proj." in name):
        return None
    order = np.arange(tensor.shape[0]).reshape(-1, config.head_dim // 2, 2)
    return order.swapaxes(1, 2).reshape(-1)


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, ensure_ascii=False, indent=1), encoding="utf-8")
