"""The decoder against transformers, and every row's independence of its company."""

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


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("family", FAMILIES)
def test_bits_do_not_depend_on_how_rows_are_cut(
    tiny_checkpoint: TinyCheckpoint, family: str, precision: Precision
) -> None:
    model = decoder(tiny_checkpoint(family), precision)
    tokens = token_ids(64)
    whole = run(model, sequence(model), tokens, taps=(0,))
    for cut in ([1] * 64, [16] * 4, [3, 1, 7, 16, 2, 35]):
        kv = sequence(model)
        at, logits, features = 0, [], []
        for rows in cut:
            part = run(model, kv, tokens[at : at + rows], taps=(0,))
            logits.append(part.logits)
            features.append(part.features)
            at += rows
        assert torch.equal(torch.cat(logits), whole.logits)
        assert torch.equal(torch.cat(features), whole.features)


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.BF16])
def test_bits_do_not_depend_on_the_neighbours(
    tiny_checkpoint: TinyCheckpoint, precision: Precision
) -> None:
    model = decoder(tiny_checkpoint("qwen3"), precision)
    lengths = [5, 1, 17, 2]
    texts = [token_ids(40 + n, seed=n) for n in lengths]
    alone = []
    for text, n in zip(texts, lengths, strict=True):
        kv = sequence(model)
        run(model, kv, text[:40])
        alone.append(run(model, kv, text[40:]).logits[-1])
        assert kv.length == 40 + n
    rows = []
    for text in texts:
        kv = sequence(model)
        run(model, kv, text[:40])
        rows.append(Rows(kv, text[40:], 1))
    together = model.forward(Batch(rows)).logits
    assert torch.equal(together, torch.stack(alone))


def test_only_wanted_rows_get_logits(tiny_checkpoint: TinyCheckpoint) -> None:
    model = decoder(tiny_checkpoint("llama"), Precision.INT8X16)
    tokens = token_ids(12)
    full = run(model, sequence(model), tokens).logits
    rows = [Rows(sequence(model), tokens, 0), Rows(sequence(model), tokens, 3)]
    assert torch.equal(model.forward(Batch(rows)).logits, full[-3:])


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


def test_a_pass_that_does_not_fit_is_refused(tiny_checkpoint: TinyCheckpoint) -> None:
    model = decoder(tiny_checkpoint("llama"), Precision.INT8)
    with pytest.raises(ValueError, match="do not fit"):
        model.forward(Batch([Rows(sequence(model, 10), token_ids(257), 1)]))
    wide = sequence(model, 300)
    with pytest.raises(ValueError, match="at most 256"):
        model.forward(Batch([Rows(wide, token_ids(300), 1)]))
