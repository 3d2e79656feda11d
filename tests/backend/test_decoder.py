"""The CPU's decoder against transformers; what holds of every decoder is in
``device/test_decoders.py``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dspark_backend.catalog.files import open_checkpoint
from dspark_backend.kv.budget import KVBudget
from dspark_backend.kv.contiguous import SequenceKV
from dspark_backend.target.batch import Batch, Rows
from dspark_backend.target.decoder import Decoder, Pass
from dspark_backend.target.load import load_decoder
from dspark_backend.target.precision import Precision

TinyCheckpoint = Callable[..., Path]
FAMILIES = ["llama", "qwen2", "qwen3"]
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *[(family, {}) for family in FAMILIES],
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"attention_bias": True}),
    ("llama", {"rope_parameters": LLAMA3_ROPE}),
    ("qwen3", {"head_dim": 24, "num_attention_heads": 6, "num_key_value_heads": 3}),
    ("qwen2", {"num_key_value_heads": 1}),
]


def decoder(folder: Path, precision: Precision) -> Decoder:
    return load_decoder(open_checkpoint("tiny", folder), precision, 256)


def sequence(model: Decoder, room: int = 200) -> SequenceKV:
    kv = SequenceKV(model.kv_shape, KVBudget(10**9))
    kv.reserve(room)
    return kv


def run(model: Decoder, kv: SequenceKV, tokens: Sequence[int], taps: Sequence[int] = ()) -> Pass:
    result = model.forward(Batch([Rows(kv, tokens, len(tokens))]), taps)
    kv.length += len(tokens)
    return result


def token_ids(count: int, seed: int = 0) -> list[int]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 384, (count,), generator=rng).tolist()


@pytest.mark.parametrize(
    ("family", "fields"), VARIANTS, ids=lambda v: v if isinstance(v, str) else "-".join(v) or "base"
)
def test_agrees_with_transformers(
    tiny_checkpoint: TinyCheckpoint, family: str, fields: dict[str, Any]
) -> None:
    folder = tiny_checkpoint(family, **fields)
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = token_ids(90)
    with torch.no_grad():
        expected = oracle(torch.tensor([tokens]), output_hidden_states=True)
    model = decoder(folder, Precision.BF16)
    result = run(model, sequence(model), tokens, taps=(-1, 0))
    # bfloat16 products against float32 ones: a few parts in a thousand of the logits' spread.
    spread = float(expected.logits.std())
    assert float((result.logits - expected.logits[0]).abs().max()) < 0.1 * spread
    features = result.features.chunk(2, dim=1)
    torch.testing.assert_close(features[0], expected.hidden_states[0][0])
    residual = expected.hidden_states[1][0]
    assert float((features[1] - residual).abs().max()) < 0.05 * float(residual.std())


def test_the_reference_precision_is_what_bf16_rounding_explains(
    tiny_checkpoint: TinyCheckpoint,
) -> None:
    folder = tiny_checkpoint("qwen2")
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rounded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokens = token_ids(60)
    with torch.no_grad():
        truth = exact(torch.tensor([tokens])).logits[0]
        theirs = rounded(torch.tensor([tokens])).logits[0].float()
    model = decoder(folder, Precision.BF16)
    ours = run(model, sequence(model), tokens).logits
    assert (ours - truth).abs().mean() < (theirs - truth).abs().mean()


def test_int8_is_close_to_bf16(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint("qwen2")
    tokens = token_ids(80)
    logits = {}
    for precision in Precision:
        model = decoder(folder, precision)
        logits[precision] = run(model, sequence(model), tokens).logits
    reference = logits[Precision.BF16]
    errors = {p: float((logits[p] - reference).abs().mean()) for p in Precision}
    assert errors[Precision.INT8X16] < errors[Precision.INT8] < 0.1 * float(reference.std())
