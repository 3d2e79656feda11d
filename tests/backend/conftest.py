"""Fixtures for the engine's tests: tiny GGUF files made from the tiny checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from torch.utils._python_dispatch import TorchDispatchMode

from dspark_backend.checkpoint.safetensors import TensorStore
from dspark_backend.kernels.recording import Capture, Tensors

_GGUF_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GGUF_OUTER_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


@pytest.fixture(scope="session")
def capture() -> Capture | None:
    """How steps are recorded: as CUDA graphs where there is a GPU (None). Else a recording runs its
    function again; as with a graph, nothing that the first run gave is kept but its place, and
    what would wait for a device is an error."""
    return None if torch.cuda.is_available() else _again


def _again(run: Callable[[], Tensors]) -> tuple[Callable[[], object], Tensors]:
    with _NeverWaiting():
        results = run()
    for result in results:
        result.fill_(torch.nan if result.is_floating_point() else 77)

    def replay() -> None:
        for result, there in zip(results, run(), strict=True):
            result.copy_(there)

    return replay, results


class _NeverWaiting(TorchDispatchMode):
    """Refuses what brings a value of the device to the host, by itself or in its result's shape."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = func.name().split("::")[1]
        if name.startswith(self.WAITS):
            raise RuntimeError(f"{name} waits for the device: it cannot be recorded")
        if name.startswith("index"):
            for index in args[1]:
                if index is not None and index.dtype is torch.bool:
                    raise RuntimeError("an index of bools waits for how many are set")
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="session")
def tiny_gguf(
    tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Makes GGUF files as llama.cpp's converter would of ``tiny_checkpoint(family, **fields)``.

    ``kind`` is the quantisation of the matrices (vectors are float32, as llama.cpp wants them);
    ``edit`` may change the writer just before the file is written.
    """

    def make(
        family: str = "llama",
        *,
        kind: GGMLQuantizationType = GGMLQuantizationType.BF16,
        edit: Callable[[GGUFWriter], Any] | None = None,
        **fields: Any,
    ) -> Path:
        folder = tiny_checkpoint(family, **fields)
        config = json.loads((folder / "config.json").read_text())
        path = tmp_path_factory.mktemp("gguf") / f"tiny-{family}.gguf"
        writer = GGUFWriter(path, family)
        _add_parameters(writer, config)
        _add_vocabulary(writer, folder)
        _add_tensors(writer, folder, config, kind)
        if edit is not None:
            edit(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return make


def _add_parameters(writer: GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])


def _add_vocabulary(writer: GGUFWriter, folder: Path) -> None:
    """As llama.cpp writes it: padded with unused tokens up to the size of the embedding."""
    document = json.loads((folder / "tokenizer.json").read_text())
    vocab = document["model"]["vocab"] | {t["content"]: t["id"] for t in document["added_tokens"]}
    special = {t["id"]: t["special"] for t in document["added_tokens"]}
    tokens = sorted(vocab, key=lambda token: vocab[token])
    types = [3 if special.get(i) else 4 if i in special else 1 for i in range(len(tokens))]
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    unused = range(len(tokens), size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*tokens, *(f"[PAD{i}]" for i in unused)])
    writer.add_token_types([*types, *(5 for _ in unused)])
    writer.add_token_merges([" ".join(pair) for pair in document["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    writer.add_chat_template(settings["chat_template"])


def _add_tensors(
    writer: GGUFWriter, folder: Path, config: dict[str, Any], kind: GGMLQuantizationType
) -> None:
    store = TensorStore.from_folder(folder)
    for name in store.names():
        array = store.get(name).float().numpy()
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        for projection, field in heads.items():
            if config["model_type"] == "llama" and f".{projection}." in name:
                array = interleave_halves(array, config[field])
        if array.ndim == 1:
            writer.add_tensor(_gguf_name(name), array)
        else:
            writer.add_tensor(_gguf_name(name), gguf.quantize(array, kind), raw_dtype=kind)


def interleave_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of Llama's q and k: the RoPE halves of a head take turns."""
    tensor = torch.from_numpy(rows)
    order = torch.arange(len(rows)).view(heads, 2, -1).transpose(1, 2).reshape(-1)
    return tensor[order].numpy()


def _gguf_name(name: str) -> str:
    if name in _GGUF_OUTER_NAMES:
        return _GGUF_OUTER_NAMES[name]
    _, _, layer, *middle, suffix = name.split(".")
    return f"blk.{layer}.{_GGUF_LAYER_NAMES['.'.join(middle)]}.{suffix}"
