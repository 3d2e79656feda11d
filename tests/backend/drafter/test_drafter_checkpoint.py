"""A checkpoint comes back as it was written; whatever does not fit is refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dspark_backend.checkpoint.config import TargetConfig
from dspark_backend.drafter import checkpoint
from dspark_backend.drafter.calibration import Calibration
from dspark_backend.drafter.checkpoint import Storage, open_drafter, write_drafter
from dspark_backend.drafter.config import DrafterConfig, HeadType
from dspark_backend.errors import ModelFormatError

MakeDrafter = Callable[..., Any]

PUBLISHED: dict[str, Any] = {
    "architectures": ["Qwen3DSparkModel"],
    "model_type": "qwen3",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 5,
    "num_target_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "layer_types": ["full_attention"] * 5,
    "tie_word_embeddings": False,
    "block_size": 7,
    "mask_token_id": 151669,
    "target_layer_ids": [1, 9, 17, 25, 33],
    "num_anchors": 512,
    "markov_rank": 256,
    "markov_head_type": "vanilla",
    "enable_confidence_head": True,
    "confidence_head_with_markov": True,
}


def write(drafter: Any, folder: Path, **options: Any) -> Path:
    write_drafter(folder, drafter.config, drafter.state, drafter.d2t, **options)
    return folder


def test_a_published_config_is_read_and_written_back() -> None:
    config = DrafterConfig.from_dict(PUBLISHED)
    assert config.shape.num_layers == 5
    assert config.feature_size == 5 * 2560
    assert (config.head, config.markov_rank, config.confidence_size) == (
        HeadType.VANILLA,
        256,
        2560 + 256,
    )
    written = config.to_dict()
    assert {name: written[name] for name in PUBLISHED} == PUBLISHED


@pytest.mark.parametrize("head", list(HeadType))
@pytest.mark.parametrize("draft_vocab", [None, 90])
def test_a_checkpoint_comes_back_as_it_was_written(
    head: str, draft_vocab: int | None, make_drafter: MakeDrafter, tmp_path: Path
) -> None:
    drafter = make_drafter("qwen3", head=head, draft_vocab=draft_vocab)
    calibration = Calibration(temperatures=(1.0, 1.1, 1.2, 1.3, 1.4), data_set="d", samples=9)
    files = open_drafter(write(drafter, tmp_path / "d", calibration=calibration), drafter.target)
    assert files.config == replace(drafter.config, shape=files.config.shape)
    assert files.calibration == calibration
    assert not files.has_target_copies
    state = files.state()
    assert state.keys() == drafter.state.keys()
    assert all(torch.equal(state[name], drafter.state[name]) for name in state)
    assert (files.d2t is None) == (draft_vocab is None)
    if files.d2t is not None:
        assert torch.equal(files.d2t, drafter.d2t)


def test_the_files_of_published_checkpoints_are_plain_bfloat16_without_prefix(
    make_drafter: MakeDrafter, tmp_path: Path
) -> None:
    drafter = make_drafter("llama")
    copies = {"embed_tokens.weight": drafter.embedding, "lm_head.weight": drafter.lm_head}
    folder = write(drafter, tmp_path / "d", target_copies=copies)
    tensors = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert {"fc.weight", "layers.1.self_attn.k_proj.weight", "markov_head.markov_w2.weight"} <= set(
        tensors
    )
    files = open_drafter(folder, drafter.target)
    assert files.has_target_copies
    assert torch.equal(files.get("lm_head.weight"), drafter.lm_head)


def test_int8_storage_halves_the_matrices_and_is_close(
    make_drafter: MakeDrafter, tmp_path: Path
) -> None:
    drafter = make_drafter("qwen2", hidden_size=128, head_dim=32)
    small = write(drafter, tmp_path / "small", storage=Storage.INT8)
    large = write(drafter, tmp_path / "large")
    tensors = [load_file(folder / "model.safetensors") for folder in (small, large)]
    wide = {name for name, tensor in drafter.state.items() if tensor.dim() == 2 and len(tensor) > 1}
    sizes = [sum(t[n].nbytes for n in wide - {"fc.weight"}) for t in tensors]
    assert sizes[0] == sizes[1] // 2
    # The residual stream has outliers that rounded weights would blow up.
    assert tensors[0]["fc.weight"].dtype is torch.bfloat16
    state = open_drafter(small, drafter.target).state()
    for name, tensor in drafter.state.items():
        step = tensor.abs().amax() / 127
        assert (state[name] - tensor).abs().max() <= 0.51 * step, name


@pytest.mark.parametrize(
    ("field", "there"), [("hidden_size", 64), ("vocab_size", 512), ("layers", 4)]
)
def test_a_drafter_for_another_target_is_refused_with_the_difference(
    field: str, there: int, make_drafter: MakeDrafter, tmp_path: Path
) -> None:
    drafter = make_drafter("llama")
    other = {
        "hidden_size": {"hidden_size": 32},
        "vocab_size": {"vocab_size": 511},
        "layers": {"num_hidden_layers": 6},
    }
    target = TargetConfig.from_dict({**drafter.target.raw, **other[field]})
    with pytest.raises(ModelFormatError, match=f"{field} {there} there"):
        open_drafter(write(drafter, tmp_path / "d"), target)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("target_layer_ids", [1, 3], "-1..2"),
        ("target_layer_ids", [2, 1], "ascending"),
        ("target_layer_ids", None, "drafter's checkpoint"),
        ("target_layer_ids", [], "empty"),
        ("markov_head_type", "wide", "wide"),
        ("block_size", 0, "block_size"),
        ("block_size", "5", "block_size"),
        ("mask_token_id", 512, "mask_token_id"),
        ("num_target_layers", None, "num_target_layers"),
        ("draft_vocab_size", 513, "draft_vocab_size"),
        ("draft_vocab_size", 100, "markov_w2"),
        ("num_hidden_layers", 3, "layers.2"),
        ("model_type", "mamba", "mamba"),
    ],
)
def test_a_config_that_cannot_be_is_refused_by_name(
    field: str, value: Any, said: str, make_drafter: MakeDrafter, tmp_path: Path
) -> None:
    drafter = make_drafter("llama")
    folder = write(drafter, tmp_path / "d")
    raw = json.loads((folder / "config.json").read_text())
    raw.pop("layer_types")
    (folder / "config.json").write_text(json.dumps({**raw, field: value}))
    with pytest.raises(ModelFormatError, match=said):
        open_drafter(folder, drafter.target)


def rewritten(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(name)
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("fc.weight", None, "'fc.weight' is missing"),
        ("fc.weight", torch.zeros(64, 64), "shape"),
        ("fc.weight", torch.zeros(64, 192, dtype=torch.int8), "fc.weight_scale"),
        ("d2t", None, "d2t"),
        ("d2t", torch.arange(89), "d2t"),
        ("d2t", torch.zeros(90, dtype=torch.int64), "ascending"),
        ("d2t", torch.arange(430, 520), "512"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    name: str, tensor: torch.Tensor | None, said: str, make_drafter: MakeDrafter, tmp_path: Path
) -> None:
    drafter = make_drafter("llama", draft_vocab=90)
    folder = write(drafter, tmp_path / "d")
    rewritten(folder, name, tensor)
    with pytest.raises(ModelFormatError, match=said):
        open_drafter(folder, drafter.target)


def test_a_failed_write_leaves_the_old_checkpoint(
    make_drafter: MakeDrafter, tmp_path: Path
) -> None:
    drafter = make_drafter("llama")
    folder = write(drafter, tmp_path / "d")
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(ModelFormatError, match=r"norm\.weight"):
        write_drafter(folder, drafter.config, drafter.state | {"norm.weight": torch.ones(3)}, None)
    assert (folder / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (1.0, 1.0, 0.0, 1.0, 1.0)])
def test_a_calibration_for_another_block_is_refused(
    temperatures: tuple[float, ...], make_drafter: MakeDrafter, tmp_path: Path
) -> None:
    drafter = make_drafter("llama")
    calibration = Calibration(temperatures=temperatures, data_set="d", samples=1)
    folder = write(drafter, tmp_path / "d", calibration=calibration)
    with pytest.raises(ModelFormatError, match="temperatures"):
        open_drafter(folder, drafter.target)


@pytest.mark.parametrize("offsets", [(1.0, 1.0), (0.0, 0.0, float("inf"), 0.0, 0.0)])
def test_offsets_for_another_block_are_refused(
    offsets: tuple[float, ...], make_drafter: MakeDrafter, tmp_path: Path
) -> None:
    drafter = make_drafter("llama")
    calibration = Calibration(temperatures=(1.0,) * 5, data_set="d", samples=1)
    folder = write(drafter, tmp_path / "d", calibration=calibration)
    text = calibration.model_copy(update={"offsets": offsets}).model_dump_json()
    (folder / "calibration.json").write_text(text.replace("null", "1e999"))
    with pytest.raises(ModelFormatError, match="offsets"):
        open_drafter(folder, drafter.target)


def test_a_large_drafter_is_split_into_small_files(
    make_drafter: MakeDrafter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_SHARD_BYTES", 20_000)
    drafter = make_drafter("llama")
    folder = write(drafter, tmp_path / "d")
    shards = list(folder.glob("*.safetensors"))
    assert len(shards) > 1
    largest = 2 * max(tensor.numel() for tensor in drafter.state.values())
    assert all(shard.stat().st_size < 20_000 + largest for shard in shards)
    state = open_drafter(folder, drafter.target).state()
    assert all(torch.equal(state[name], drafter.state[name]) for name in state)
