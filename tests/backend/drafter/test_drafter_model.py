"""The torch module says what DSPARK.md says, for every head, family, size and context length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dspark_backend.drafter.backbone import block_mask
from dspark_backend.drafter.model import DraftModel

MakeDrafter = Callable[..., Any]

VARIANTS: list[dict[str, Any]] = [
    {"family": "llama", "head": "none"},
    {"family": "llama", "head": "vanilla"},
    {"family": "qwen2", "head": "gated"},
    {"family": "qwen3", "head": "rnn"},
    {"family": "qwen3", "head": "vanilla", "draft_vocab": 77, "rank": 5},
    {"family": "qwen2", "head": "rnn", "block_size": 1, "num_layers": 1, "taps": (1,)},
    {"family": "llama", "head": "gated", "confidence": False},
    {
        "family": "llama",
        "head": "rnn",
        "block_size": 7,
        "hidden_size": 36,
        "intermediate_size": 50,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "rope_theta": 500.0,
    },
]
IDS = [f"{v['family']}-{v['head']}-{i}" for i, v in enumerate(VARIANTS)]


def build(drafter: Any, positions: int = 512) -> DraftModel:
    model = DraftModel(drafter.config, drafter.embedding, drafter.lm_head, positions)
    model.load_state_dict(drafter.state)
    return model


def draft(
    model: DraftModel, drafter: Any, features: Tensor, anchor: int
) -> tuple[list[int], Tensor, Tensor]:
    """Greedy drafts after ``features``, then their logits and confidences with those known."""
    token, start = torch.tensor([[anchor]]), torch.tensor([[len(features)]])
    hidden = model.hidden(features[None], token, start)[:, 0]
    tokens, sure = model.chain(hidden, token[0], drafter.d2t)
    previous = torch.cat([token, tokens[:, :-1]], dim=1)
    latents, forced = model.latents(hidden, previous)
    torch.testing.assert_close(forced, sure)
    return tokens[0].tolist(), model.logits(hidden, latents)[0], torch.sigmoid(sure[0])


@pytest.mark.parametrize("variant", VARIANTS, ids=IDS)
@pytest.mark.parametrize("context", [0, 1, 37])
def test_drafts_logits_and_confidences_are_those_of_the_reference(
    variant: dict[str, Any], context: int, make_drafter: MakeDrafter
) -> None:
    drafter = make_drafter(**variant)
    features = drafter.features(context)
    tokens, logits, sure = draft(build(drafter), drafter, features, 17)
    expected_tokens, expected_logits, expected_sure = drafter.reference().draft(features, 17)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sure, torch.tensor(expected_sure), rtol=1e-4, atol=1e-4)
    assert tokens == expected_tokens


@pytest.mark.parametrize("context", [131, 300])
def test_long_contexts(context: int, make_drafter: MakeDrafter) -> None:
    drafter = make_drafter("qwen3", head="rnn", draft_vocab=200)
    features = drafter.features(context)
    tokens, logits, _ = draft(build(drafter), drafter, features, 3)
    expected_tokens, expected_logits, _ = drafter.reference().draft(features, 3)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=2e-4)
    assert tokens == expected_tokens


def test_training_many_anchors_at_once_sees_what_drafting_one_by_one_sees(
    make_drafter: MakeDrafter,
) -> None:
    drafter = make_drafter("llama", head="rnn")
    model = build(drafter)
    features = torch.stack([drafter.features(40, seed) for seed in range(2)])
    anchors = torch.tensor([[3, 39, 20], [0, 7, 39]])
    tokens = torch.tensor([[5, 6, 7], [8, 9, 10]])
    together = model.hidden(features, tokens, anchors)
    for b in range(2):
        for a in range(3):
            start = int(anchors[b, a])
            alone = model.hidden(
                features[b : b + 1, :start],
                tokens[b : b + 1, a : a + 1],
                anchors[b : b + 1, a : a + 1],
            )
            torch.testing.assert_close(together[b, a], alone[0, 0], rtol=1e-4, atol=1e-4)


def test_the_confidence_of_a_slot_does_not_know_its_own_draft(make_drafter: MakeDrafter) -> None:
    """What may be scheduled by without bias (DSPARK.md, section 6)."""
    drafter = make_drafter("llama", head="rnn")
    model = build(drafter)
    hidden = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(1))
    _, before = model.latents(hidden, torch.tensor([[1, 2, 3, 4, 5]]))
    _, after = model.latents(hidden, torch.tensor([[1, 2, 3, 9, 9]]))
    assert torch.equal(before[0, :3], after[0, :3])
    assert not torch.equal(before[0, 3], after[0, 3])


def test_the_block_mask_shows_the_context_before_the_anchor_and_the_own_block_both_ways() -> None:
    mask = block_mask(torch.tensor([[1, 3]]), context_length=4, block_size=2)[0, 0]
    rows = ["".join(".x"[int(cell)] for cell in row) for row in mask]
    assert rows == ["x...xx..", "x...xx..", "xxx...xx", "xxx...xx"]
