"""The device's decoder, under Triton's interpreter where there is no GPU, against transformers;
what holds of every decoder is in ``test_decoders.py``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dspark_backend.catalog.files import open_checkpoint
from dspark_backend.kv.sequence import KV
from dspark_backend.target.batch import Batch, Rows
from dspark_backend.target.device import DeviceDecoder
from dspark_backend.target.device_load import load_device_decoder
from dspark_backend.target.protocol import Pass

TinyCheckpoint = Callable[..., Path]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("qwen2", {"num_key_value_heads": 1}),
    ("qwen3", {}),
    ("llama", {"tie_word_embeddings": True, "attention_bias": True}),
    ("llama", {"rope_parameters": LLAMA3_ROPE}),
    ("qwen3", {"head_dim": 24, "num_attention_heads": 6, "num_key_value_heads": 3}),
]


def decoder(folder: Path, dtype: torch.dtype = torch.float32) -> DeviceDecoder:
    return load_device_decoder(open_checkpoint("tiny", folder), dtype, 256, DEVICE)


def sequences(model: DeviceDecoder, count: int = 1, room: int = 130) -> list[KV]:
    storage = model.storage(None, count * 192 * model.kv_shape.bytes_per_token)
    made = [storage.new() for _ in range(count)]
    for kv in made:
        kv.reserve(room)
    return made


def run(model: DeviceDecoder, kv: KV, tokens: Sequence[int], taps: Sequence[int] = ()) -> Pass:
    result = model.forward(Batch([Rows(kv, tokens, len(tokens))]), taps)
    kv.length += len(tokens)
    return result


def token_ids(count: int, seed: int = 0) -> list[int]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 384, (count,), generator=rng).tolist()


@pytest.mark.parametrize(
    ("family", "fields"), VARIANTS, ids=lambda v: v if isinstance(v, str) else "-".join(v) or "base"
)
def test_agrees_with_transformers_in_float32(
    tiny_checkpoint: TinyCheckpoint, family: str, fields: dict[str, Any]
) -> None:
    folder = tiny_checkpoint(family, **fields)
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = token_ids(90)  # past the end of a page
    with torch.no_grad():
        expected = oracle(torch.tensor([tokens]), output_hidden_states=True)
    model = decoder(folder)
    (kv,) = sequences(model)
    parts = [run(model, kv, piece, taps=(-1, 0)) for piece in (tokens[:70], tokens[70:])]
    logits = torch.cat([part.logits for part in parts]).cpu()
    torch.testing.assert_close(logits, expected.logits[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(logits.argmax(-1), expected.logits[0].argmax(-1))
    features = torch.cat([part.features for part in parts]).cpu().chunk(2, dim=1)
    for ours, theirs in zip(features, expected.hidden_states, strict=False):
        torch.testing.assert_close(ours, theirs[0], rtol=1e-4, atol=1e-4)


def test_bfloat16_is_what_its_rounding_explains(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint("qwen2")
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rounded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokens = token_ids(60)
    with torch.no_grad():
        truth = exact(torch.tensor([tokens])).logits[0]
        theirs = rounded(torch.tensor([tokens])).logits[0].float()
    model = decoder(folder, torch.bfloat16)
    (kv,) = sequences(model)
    ours = run(model, kv, tokens).logits.cpu()
    assert ours.dtype is torch.bfloat16
    # Where hardware rounds to the nearest bfloat16, the interpreter cuts off: twice the error.
    allowed = 1 if DEVICE.type == "cuda" else 2
    assert (ours.float() - truth).abs().mean() < allowed * (theirs - truth).abs().mean()


def test_a_pass_without_room_or_of_two_pools_is_refused(tiny_checkpoint: TinyCheckpoint) -> None:
    model = decoder(tiny_checkpoint("llama"))
    (kv,) = sequences(model, room=10)
    with pytest.raises(ValueError, match="do not fit: room for 64 reserved"):
        model.forward(Batch([Rows(kv, token_ids(70), 1)]))
    (other,) = sequences(model)
    with pytest.raises(ValueError, match="pages of one pool"):
        model.forward(Batch([Rows(kv, token_ids(2), 1), Rows(other, token_ids(2), 1)]))
