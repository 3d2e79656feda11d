"""The loss (DSPARK.md, section 4), example by example, so that only one example's logits exist.

    L = 0.1 CE + 0.9 sum|p_draft - p_target| + 1.0 BCE(c_k, 1 - 0.5 sum|p_draft - p_target|)

each slot weighted ``exp(-(k - 1) / 4)``, normalised by the sum of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dspark_backend.drafter.model import DraftModel
from dspark_backend.training.blocks import Blocks


@dataclass(frozen=True, slots=True)
class LossWeights:
    """The published weights; ``decay`` is the slots over which a slot's weight falls by e."""

    cross_entropy: float = 0.1
    variation: float = 0.9
    confidence: float = 1.0
    decay: float = 4.0


@dataclass(frozen=True, slots=True)
class StepFigures:
    """What a step's blocks showed. ``loss`` and its parts are weighted means; ``agreement`` [g] is
    how often slot k's most likely token was the target's, given the rollout before it."""

    loss: float
    cross_entropy: float
    variation: float
    confidence: float
    agreement: tuple[float, ...]


def backward(
    model: DraftModel,
    blocks: Blocks,
    target_head: Tensor,
    draft_ids: Tensor,
    weights: LossWeights,
) -> StepFigures:
    """Accumulate the loss's gradient in ``model``'s parameters; returns the figures.

    ``target_head`` [output_size, d]: the target's LM head over the draft vocabulary;
    ``draft_ids`` int64 [V]: target id to draft id or -1. Both on the model's device.
    """
    device = model.lm_head.device
    size = model.config.block_size
    hidden = model.hidden(
        blocks.features.to(device), blocks.anchor_tokens.to(device), blocks.anchors.to(device)
    )
    latents, confidence = model.latents(hidden, blocks.previous.to(device))
    falling = torch.exp(-torch.arange(size, device=device) / weights.decay)
    slot_weights = blocks.valid.to(device) * falling
    slot_weights = slot_weights / slot_weights.sum()

    hidden_grad = torch.zeros_like(hidden)
    latents_grad = None if latents is None else torch.zeros_like(latents)
    variation = torch.zeros(blocks.tokens.shape, device=device)
    right = torch.zeros(blocks.tokens.shape, dtype=torch.bool, device=device)
    cross_entropy = torch.zeros((), device=device)
    for index, example in enumerate(blocks.examples):
        rows = blocks.rows[index].to(device).flatten()
        labels = draft_ids[blocks.tokens[index].to(device)].flatten()
        target = _target_probabilities(
            example.hidden.to(device), target_head, example.outside.to(device)
        )
        with torch.no_grad():
            piece = None if latents is None else latents[index].flatten(0, 1)
            logits = model.logits(hidden[index].flatten(0, 1), piece).float()
            loss = _distribution_loss(
                logits, target[rows], labels, slot_weights[index].flatten(), weights
            )
            _accumulate(model, index, loss.grad, hidden_grad, latents_grad, latents)
        variation[index] = loss.variation.view_as(variation[index])
        greedy = draft_ids[example.greedy.to(device)][rows]
        right[index] = (loss.best == greedy).view_as(right[index])
        cross_entropy += loss.cross_entropy
    surviving = 1 - 0.5 * variation
    sure = functional.binary_cross_entropy_with_logits(
        confidence.float(), surviving, weight=slot_weights, reduction="sum"
    )
    roots, grads = [hidden], [hidden_grad]
    if latents is not None and latents_grad is not None:
        roots.append(latents)
        grads.append(latents_grad)
    if model.confidence_head is not None:
        roots.append(weights.confidence * sure)
        grads.append(torch.ones_like(sure))
    torch.autograd.backward(roots, grads)
    mean_variation = (variation * slot_weights).sum()
    total = (
        weights.cross_entropy * cross_entropy
        + weights.variation * mean_variation
        + weights.confidence * sure
    )
    valid = blocks.valid.to(device)
    agreement = (right & valid).sum((0, 1)) / valid.sum((0, 1)).clamp_min(1)
    return StepFigures(
        float(total.detach()),
        float(cross_entropy),
        float(mean_variation),
        float(sure.detach()),
        tuple(agreement.tolist()),
    )


@dataclass(frozen=True, slots=True)
class _Distribution:
    """``grad`` [N, D] of the weighted loss by the logits; ``variation`` float32 [N] per slot;
    ``best`` int64 [N], the most likely draft id; ``cross_entropy`` weighted, scalar."""

    grad: Tensor
    variation: Tensor
    best: Tensor
    cross_entropy: Tensor


def _distribution_loss(
    logits: Tensor, target: Tensor, labels: Tensor, slot_weights: Tensor, weights: LossWeights
) -> _Distribution:
    """Loss and gradient in closed form: the logits are the bulk of a step, and autograd would keep
    several copies of them.

    d CE / d z = p - onehot; d sum|p - t| / d z = p (s - p . s) with s = sign(p - t).
    A label that the drafter cannot say (-1) has no cross-entropy.
    """
    p = torch.softmax(logits, dim=-1)
    best = p.argmax(dim=-1)
    difference = p - target
    # What the target gives to tokens out of reach counts too: p is 0 there.
    outside = 1 - target.sum(dim=-1)
    variation = difference.abs().sum(dim=-1) + outside
    sign = difference.sign_()
    sign -= (p * sign).sum(dim=-1, keepdim=True)
    grad = sign.mul_(p).mul_((weights.variation * slot_weights)[:, None])
    sayable = labels >= 0
    ce_weights = torch.where(sayable, slot_weights, torch.zeros_like(slot_weights))
    known = labels.clamp_min(0)[:, None]
    log_p = torch.log_softmax(logits, dim=-1).gather(1, known).squeeze(1)
    cross_entropy = -(log_p * ce_weights).sum()
    scaled = (weights.cross_entropy * ce_weights)[:, None]
    grad += p * scaled
    grad.scatter_add_(1, known, -scaled)
    return _Distribution(grad, variation, best, cross_entropy)


def _target_probabilities(hidden: Tensor, head: Tensor, outside: Tensor) -> Tensor:
    """p_target over the draft vocabulary, float32 [A, D]; a row sums to ``1 - outside``."""
    with torch.no_grad():
        logits = functional.linear(hidden.to(head.dtype), head).float()
        return torch.softmax(logits, dim=-1) * (1 - outside)[:, None]


def _accumulate(
    model: DraftModel,
    index: int,
    grad: Tensor,
    hidden_grad: Tensor,
    latents_grad: Tensor | None,
    latents: Tensor | None,
) -> None:
    """Carry the logits' gradient to the hidden states, the latents and W2."""
    reduced = grad.to(model.lm_head.dtype)
    shape = hidden_grad[index].shape
    hidden_grad[index] = (reduced @ model.lm_head).reshape(shape).to(hidden_grad.dtype)
    if model.markov_head is None or latents is None or latents_grad is None:
        return
    w2 = model.markov_head.markov_w2.weight
    wide = w2.to(reduced.dtype)
    latents_grad[index] = (reduced @ wide).reshape(latents_grad[index].shape).to(latents_grad.dtype)
    own = (reduced.T @ latents[index].flatten(0, 1).to(reduced.dtype)).to(w2.dtype)
    w2.grad = own if w2.grad is None else w2.grad.add_(own)
