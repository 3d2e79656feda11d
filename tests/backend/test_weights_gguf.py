"""GGUF conversion: exact weights, the right order and names, and headers that lie."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dspark_backend.checkpoint.config import TargetConfig
from dspark_backend.checkpoint.convert import convert_gguf
from dspark_backend.checkpoint.gguf import GGUFFile
from dspark_backend.checkpoint.safetensors import TensorStore
from dspark_backend.errors import ModelFormatError
from dspark_backend.tokenizer import Tokenizer

MakeFile = Callable[..., Path]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_bf16_round_trip_is_exact(
    tiny_checkpoint: MakeFile, tiny_gguf: MakeFile, tmp_path: Path, family: str, tied: bool
) -> None:
    fields = {"tie_word_embeddings": tied, "rms_norm_eps": 1e-5}
    convert_gguf(tiny_gguf(family, **fields), tmp_path)
    original = TensorStore.from_folder(tiny_checkpoint(family, **fields))
    result = TensorStore.from_folder(tmp_path)
    assert sorted(result.names()) == sorted(original.names())
    for name in original.names():
        assert torch.equal(result.get(name), original.get(name)), name


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_config_round_trip(
    tiny_checkpoint: MakeFile, tiny_gguf: MakeFile, tmp_path: Path, family: str
) -> None:
    convert_gguf(tiny_gguf(family, rms_norm_eps=1e-5), tmp_path)
    ours = TargetConfig.from_folder(tmp_path)
    original = TargetConfig.from_folder(tiny_checkpoint(family, rms_norm_eps=1e-5))
    differing = {
        name
        for name in vars(original)
        if name != "raw" and getattr(ours, name) != getattr(original, name)
    }
    assert not differing


def test_biases_of_llama_are_reordered_with_their_rows(
    tiny_checkpoint: MakeFile, tiny_gguf: MakeFile, tmp_path: Path
) -> None:
    convert_gguf(tiny_gguf("llama", attention_bias=True), tmp_path)
    original = TensorStore.from_folder(tiny_checkpoint("llama", attention_bias=True))
    name = "model.layers.1.self_attn.k_proj.bias"
    assert torch.equal(TensorStore.from_folder(tmp_path).get(name), original.get(name))


@pytest.mark.parametrize(
    "kind",
    [
        GGMLQuantizationType.F16,
        GGMLQuantizationType.Q8_0,
        GGMLQuantizationType.Q4_0,
        GGMLQuantizationType.Q4_1,
        GGMLQuantizationType.Q5_0,
    ],
    ids=lambda kind: kind.name,
)
def test_quantised_weights_are_the_rounded_blocks(
    tiny_checkpoint: MakeFile, tiny_gguf: MakeFile, tmp_path: Path, kind: GGMLQuantizationType
) -> None:
    convert_gguf(tiny_gguf("qwen2", kind=kind), tmp_path)
    original = TensorStore.from_folder(tiny_checkpoint("qwen2"))
    result = TensorStore.from_folder(tmp_path)
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight"):
        blocks = gguf.quantize(original.get(name).float().numpy(), kind)
        expected = torch.from_numpy(gguf.dequantize(blocks, kind)).bfloat16()
        assert torch.equal(result.get(name), expected)


def test_conversion_in_many_chunks_is_the_same(
    tiny_gguf: MakeFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_gguf("llama", kind=GGMLQuantizationType.Q8_0)
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    for folder, elements in ((whole, 1 << 20), (pieces, 64 * 48)):
        folder.mkdir()
        monkeypatch.setattr("dspark_backend.checkpoint.convert._CHUNK_ELEMENTS", elements)
        convert_gguf(source, folder)
    assert (whole / "model.safetensors").read_bytes() == (pieces / "model.safetensors").read_bytes()


def test_progress_counts_up_to_the_written_bytes(tiny_gguf: MakeFile, tmp_path: Path) -> None:
    reports: list[tuple[int, int]] = []
    convert_gguf(tiny_gguf("qwen3"), tmp_path, lambda done, total: reports.append((done, total)))
    done = [report[0] for report in reports]
    store = TensorStore.from_folder(tmp_path)
    assert done == sorted(done)
    assert reports[-1] == (sum(store.get(n).nbytes for n in store.names()),) * 2


def test_tokenizer_is_the_original_without_padding(
    tiny_checkpoint: MakeFile, tiny_gguf: MakeFile, tmp_path: Path
) -> None:
    convert_gguf(tiny_gguf("qwen2"), tmp_path)
    ours, original = Tokenizer(tmp_path), Tokenizer(tiny_checkpoint("qwen2"))
    text = 'def add(a, b):\n\treturn "é∂🙂"<tool_call>{"name": "x"}</tool_call><|im_end|>'
    assert ours.encode(text) == original.encode(text)
    assert ours.vocab_size == original.vocab_size < 512
    assert ours.special_ids == original.special_ids
    assert ours.eos_token_ids == (2, 0)
    assert ours.chat_template == original.chat_template


def test_llama3_rope_scaling_is_recognised_from_its_divisors(
    tiny_gguf: MakeFile, tmp_path: Path
) -> None:
    """The divisors come from transformers' own rule, so a wrong reading of them would show."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, head_dim=16, max_position_embeddings=131072,
        rope_parameters={"rope_theta": 500000.0, **scaling},
    )  # fmt: skip
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / 500000.0 ** (torch.arange(0, 16, 2) / 16)
    divisors = (plain / frequencies).float().numpy()
    source = tiny_gguf(
        "llama",
        rope_theta=500000.0,
        edit=lambda writer: writer.add_tensor("rope_freqs.weight", divisors),
    )
    convert_gguf(source, tmp_path)
    assert TargetConfig.from_folder(tmp_path).rope_scaling == scaling


def test_linear_rope_scaling(tiny_gguf: MakeFile, tmp_path: Path) -> None:
    def edit(writer: GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    convert_gguf(tiny_gguf("llama", edit=edit), tmp_path)
    assert TargetConfig.from_folder(tmp_path).rope_scaling == {
        "rope_type": "linear",
        "factor": 4.0,
    }


def _change(key: str, value: Any) -> Callable[[GGUFWriter], None]:
    def edit(writer: GGUFWriter) -> None:
        writer.kv_data[0][key].value = value

    return edit


def _retype(key: str) -> Callable[[GGUFWriter], None]:
    def edit(writer: GGUFWriter) -> None:
        del writer.kv_data[0][key]
        writer.add_array(key, ["a", "list", "of", "strings"])

    return edit


def _add(key: str, value: int) -> Callable[[GGUFWriter], None]:
    return lambda writer: writer.add_uint32(key, value)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (_change("general.architecture", "mamba"), "mamba"),
        (_change("llama.embedding_length", 96), "token_embd|embed_tokens"),
        (_change("llama.block_count", 3), r"model\.layers\.2"),
        (_change("llama.block_count", 4_000_000_000), "num_hidden_layers"),
        (_change("llama.attention.head_count", 0), "num_attention_heads"),
        (_retype("llama.attention.head_count"), "head_count"),
        (_retype("llama.attention.layer_norm_rms_epsilon"), "epsilon"),
        (_retype("general.architecture"), "architecture"),
        (_retype("tokenizer.ggml.token_type"), "token_type"),
        (_retype("tokenizer.ggml.pre"), "pre-tokenizer"),
        (_change("tokenizer.ggml.model", "t5"), "t5"),
        (_change("tokenizer.ggml.pre", "tekken"), "tekken"),
        (_change("tokenizer.ggml.eos_token_id", 512), "eos_token_id"),
        (_change("tokenizer.ggml.tokens", ["a", "a"]), "tokens"),
        (_change("tokenizer.ggml.merges", ["abc"]), "merges"),
        (_add("llama.expert_count", 8), "expert"),
        (_add("llama.rope.dimension_count", 8), "RoPE"),
        (_add("split.count", 2), "split"),
        (lambda writer: writer.add_tensor("blk.0.ssm.weight", np.ones(4, np.float32)), "ssm"),
    ],
)  # fmt: skip
def test_unsupported_or_inconsistent_metadata_is_named(
    tiny_gguf: MakeFile, tmp_path: Path, edit: Callable[[GGUFWriter], None], named: str
) -> None:
    with pytest.raises(ModelFormatError, match=named):
        convert_gguf(tiny_gguf("llama", edit=edit), tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


def _header(*, version: int = 3, tensors: int = 0, keys: int = 0, body: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + body


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def _tensor(shape: tuple[int, ...], kind: int, offset: int, name: str = "t") -> bytes:
    rank = len(shape)
    return _text(name) + struct.pack(f"<I{rank}QIQ", rank, *shape, kind, offset)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"", "GGUF"),
        (b"PK\x03\x04" * 10, "magic"),
        (b"GGUF\x03\x00", "version"),
        (_header(version=1), "version"),
        (_header(version=0x03000000), "version"),
        (_header(tensors=1 << 60), "tensor count"),
        (_header(keys=1 << 60), "key count"),
        (_header(keys=1, body=struct.pack("<Q", 1 << 62)), "claims"),
        (_header(keys=1, body=_text("k") + struct.pack("<I", 99)), "unknown type"),
        (_header(keys=1, body=_text("k") + struct.pack("<IIQ", 9, 4, 1 << 61)), "claims"),
        (_header(keys=1, body=_text("k") + struct.pack("<IIQ", 9, 8, 1 << 61)), "claims"),
        (_header(keys=1, body=_text("k") + struct.pack("<IIQ", 9, 9, 1)), "unknown type"),
        (_header(tensors=1, body=_tensor((4, 4, 4, 4, 4), 0, 0)), "dimensions"),
        (_header(tensors=1, body=_tensor((1 << 50,), 0, 0)), "absurd"),
        (_header(tensors=1, body=_tensor((0,), 0, 0)), "absurd"),
        (_header(tensors=1, body=_tensor((1 << 39, 1 << 39), 0, 0)), "truncated"),
        (_header(tensors=1, body=_tensor((4,), 0, 1 << 40)), "truncated"),
        (_header(tensors=1, body=_tensor((4,), 0, 7)), "truncated|damaged"),
        (_header(tensors=1, body=_tensor((4,), 77, 0)), "quantisation"),
        (_header(tensors=1, body=_tensor((40,), 2, 0)), "block"),
        (_header(tensors=2, body=_tensor((4,), 0, 0) * 2 + bytes(64)), "twice"),
        (
            _header(
                tensors=2, body=_tensor((16,), 0, 0) + _tensor((16,), 0, 32, "u") + bytes(256)
            ),
            "overlaps",
        ),
    ],
)  # fmt: skip
def test_hostile_headers_are_refused(tmp_path: Path, data: bytes, named: str) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelFormatError, match=named):
        GGUFFile(path)


@pytest.fixture(scope="module")
def small_file(tiny_gguf: MakeFile) -> Path:
    return tiny_gguf("llama", num_hidden_layers=1)


def test_a_file_cut_anywhere_is_refused(small_file: Path, tmp_path: Path) -> None:
    data, path = small_file.read_bytes(), tmp_path / "cut.gguf"
    for length in range(0, len(data) - 32, len(data) // 150):
        path.write_bytes(data[:length])
        with pytest.raises(ModelFormatError):
            GGUFFile(path)


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(position=st.integers(0, 1 << 14), value=st.binary(min_size=1, max_size=8))
def test_damaged_bytes_convert_or_are_refused(
    small_file: Path, tmp_path_factory: pytest.TempPathFactory, position: int, value: bytes
) -> None:
    """Whatever a header claims, the outcome is a checkpoint or a ModelFormatError."""
    folder = tmp_path_factory.mktemp("fuzz")
    path, data = folder / "damaged.gguf", small_file.read_bytes()
    path.write_bytes(data[:position] + value + data[position + len(value) :])
    try:
        convert_gguf(path, folder)
    except ModelFormatError:
        return
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
