"""The hand-written gradient is the derivative of the loss as DSPARK.md states it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dspark_backend.drafter.model import DraftModel
from dspark_backend.training.blocks import Blocks, sample_blocks
from dspark_backend.training.features import DecoderFeatures
from dspark_backend.training.objective import LossWeights, backward
from dspark_backend.training.rollout import Rollout
from dspark_backend.training.vocabulary import draft_ids

WEIGHTS = LossWeights()


def plain_loss(model: DraftModel, blocks: Blocks, head: Tensor, to_draft: Tensor) -> Tensor:
    """Section 4, slot by slot, left to autograd."""
    hidden = model.hidden(blocks.features, blocks.anchor_tokens, blocks.anchors)
    latents, confidence = model.latents(hidden, blocks.previous)
    terms, total_weight = [], 0.0
    for b, a, k in torch.nonzero(blocks.valid).tolist():
        example, row = blocks.examples[b], int(blocks.rows[b, a, k])
        logits = head @ example.hidden[row].float()
        target = torch.softmax(logits, 0) * (1 - example.outside[row])
        draft_logits = model.logits(hidden[b, a, k], None if latents is None else latents[b, a, k])
        p = torch.softmax(draft_logits, 0)
        distance = (p - target).abs().sum() + example.outside[row]
        label = int(to_draft[blocks.tokens[b, a, k]])
        cross_entropy = -torch.log(p[label]) if label >= 0 else torch.zeros(())
        survival = (1 - 0.5 * distance).detach()
        c = torch.sigmoid(confidence[b, a, k])
        bce = -(survival * torch.log(c) + (1 - survival) * torch.log(1 - c))
        weight = math.exp(-k / 4)
        total_weight += weight
        sure = 1.0 if model.confidence_head is not None else 0.0
        terms.append(weight * (0.1 * cross_entropy + 0.9 * distance + sure * bce))
    return torch.stack(terms).sum() / total_weight


@pytest.mark.parametrize("head", ["none", "vanilla", "gated", "rnn"])
@pytest.mark.parametrize("reduced", [False, True])
def test_gradients_are_those_of_the_stated_loss(
    head: str,
    reduced: bool,
    draft_model: Callable[..., DraftModel],
    decoder_features: Callable[..., DecoderFeatures],
    rollouts: list[Rollout],
) -> None:
    # Tokens 50 to 59 cannot be said, some of the rollouts' among them.
    d2t = torch.tensor([*range(50), *range(60, 300)]) if reduced else None
    ours, plain = draft_model(head, d2t), draft_model(head, d2t)
    for model in (ours, plain):
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape)
    source = decoder_features(d2t)
    examples = [source.example(rollout) for rollout in rollouts[:3]]
    blocks = sample_blocks(examples, 6, 4, torch.Generator().manual_seed(0))
    to_draft = draft_ids(d2t, 512)
    figures = backward(ours, blocks, ours.lm_head, to_draft, WEIGHTS)
    loss = plain_loss(plain, blocks, plain.lm_head, to_draft)
    loss.backward()
    if ours.confidence_head is None:
        assert figures.confidence > 0
    assert figures.loss == pytest.approx(float(loss.detach()), rel=1e-4)
    for (name, mine), (_, expected) in zip(
        ours.named_parameters(), plain.named_parameters(), strict=True
    ):
        assert expected.grad is not None, name
        assert mine.grad is not None, name
        scale = float(expected.grad.abs().max()) + 1e-8
        error = float((mine.grad - expected.grad).abs().max())
        assert error < 2e-4 * scale, (name, error, scale)


def test_agreement_counts_the_targets_most_likely_tokens(
    draft_model: Callable[..., DraftModel],
    decoder_features: Callable[..., DecoderFeatures],
    rollouts: list[Rollout],
) -> None:
    model = draft_model()
    examples = [decoder_features().example(rollout) for rollout in rollouts[:2]]
    blocks = sample_blocks(examples, 50, 4, torch.Generator().manual_seed(0))
    figures = backward(model, blocks, model.lm_head, draft_ids(None, 512), WEIGHTS)
    hidden = model.hidden(blocks.features, blocks.anchor_tokens, blocks.anchors)
    latents, _ = model.latents(hidden, blocks.previous)
    best = model.logits(hidden, latents).argmax(dim=-1)
    right: Any = [[0, 0] for _ in range(4)]
    for b, a, k in torch.nonzero(blocks.valid).tolist():
        right[k][0] += int(best[b, a, k] == examples[b].greedy[blocks.rows[b, a, k]])
        right[k][1] += 1
    assert figures.agreement == pytest.approx([hits / of for hits, of in right])
