"""Features are the residual stream that transformers calls hidden states."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers

from dspark_backend.catalog import ModelFiles
from dspark_backend.request import StepKind
from dspark_backend.target.precision import Precision
from dspark_backend.training.features import (
    CHUNK_ROWS,
    DecoderFeatures,
    Example,
    FeatureMemory,
    outside_mass,
)
from dspark_backend.training.rollout import Rollout


@pytest.mark.parametrize("prompt_length", [3, CHUNK_ROWS, CHUNK_ROWS + 1])
def test_features_hidden_states_and_greedy_tokens_are_those_of_transformers(
    prompt_length: int, tiny_files: ModelFiles, decoder_features: Callable[..., DecoderFeatures]
) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = tuple(torch.randint(0, 512, (prompt_length + 40,), generator=generator).tolist())
    rollout = Rollout("k", "s", StepKind.TEXT, tokens[:prompt_length], tokens[prompt_length:])
    d2t = torch.arange(0, 512, 3)
    example = decoder_features(d2t, Precision.INT8X16).example(rollout)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_files.folder, dtype=torch.float32
    )
    with torch.no_grad():
        out = model(torch.tensor([tokens]), output_hidden_states=True)
    streams = torch.cat([out.hidden_states[layer + 1][0] for layer in (0, 1, 2)], dim=-1)
    assert example.first == prompt_length
    assert example.features.shape == streams.shape
    torch.testing.assert_close(example.features.float(), streams, rtol=0.05, atol=0.2)
    rows = slice(prompt_length - 1, -1)
    last, logits = out.hidden_states[-1][0, rows], out.logits[0, rows]
    torch.testing.assert_close(example.hidden.float(), last, rtol=0.05, atol=0.2)
    expected = 1 - torch.softmax(logits, dim=-1)[:, d2t].sum(dim=-1)
    torch.testing.assert_close(example.outside, expected, rtol=0.05, atol=0.05)
    assert (example.greedy == logits.argmax(dim=-1)).float().mean() > 0.85


def test_nothing_is_outside_of_the_whole_vocabulary() -> None:
    logits = torch.randn(4, 9)
    assert outside_mass(logits, None).tolist() == [0.0] * 4
    assert outside_mass(logits, torch.arange(9)).abs().max() < 1e-6


def test_memory_computes_once_and_gives_the_oldest_up_first(
    decoder_features: Callable[..., DecoderFeatures], rollouts: list[Rollout]
) -> None:
    asked: list[str] = []

    class Counting:
        def example(self, rollout: Rollout) -> Example:
            asked.append(rollout.key)
            return decoder.example(rollout)

    decoder = decoder_features()
    size = decoder.example(rollouts[11]).bytes
    memory = FeatureMemory(Counting(), limit_bytes=int(2.5 * size))
    for index in (9, 10, 9, 11, 9, 10):
        memory.example(rollouts[index])
    assert asked == ["key9", "key10", "key11", "key10"]
