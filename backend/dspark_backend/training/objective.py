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

# Rows of logits that are worked on at once on a CPU: a handful of 12k floats fit the second cache.
_CPU_ROWS = 8


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
        with torch.no_grad():
            piece = None if latents is None else latents[index].flatten(0, 1)
            loss = distribution_loss(
                base=model.base_logits(hidden[index].flatten(0, 1)),
                bias=None if piece is None else model.bias(piece),
                target=_target_logits(example.hidden.to(device), target_head),
                outside=example.outside.to(device),
                rows=blocks.rows[index].to(device).flatten(),
                labels=draft_ids[blocks.tokens[index].to(device)].flatten(),
                slot_weights=slot_weights[index].flatten(),
                weights=weights,
            )
            _accumulate(model, index, loss.grad, hidden_grad, latents_grad, latents)
        variation[index] = loss.variation.view_as(variation[index])
        greedy = draft_ids[example.greedy.to(device)][blocks.rows[index].to(device)]
        right[index] = loss.best.view_as(greedy) == greedy
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
class Distribution:
    """``grad`` [N, D] of the weighted loss by the logits, in the logits' dtype; ``variation``
    float32 [N] per slot; ``best`` int64 [N], the most likely draft id; ``cross_entropy`` weighted,
    a scalar."""

    grad: Tensor
    variation: Tensor
    best: Tensor
    cross_entropy: Tensor


def distribution_loss(
    base: Tensor,
    bias: Tensor | None,
    target: Tensor,
    outside: Tensor,
    rows: Tensor,
    labels: Tensor,
    slot_weights: Tensor,
    weights: LossWeights,
) -> Distribution:
    """Loss and gradient of one example's N slots in closed form.

    ``base`` and ``bias`` [N, D]: the two parts of the draft's logits (``base`` is overwritten);
    ``target`` [A, D] logits of the target, ``outside`` float32 [A], of which slot i reads row
    ``rows[i]``; ``labels`` int64 [N], -1 for what the drafter cannot say (no cross-entropy then).

    d CE / d z = p - onehot; d sum|p - t| / d z = p (s - p . s) with s = sign(p - t). Autograd would
    keep several copies of the logits, which are the bulk of a step; a few rows at a time stay in a
    CPU's cache besides.
    """
    count = len(labels)
    variation = base.new_empty(count, dtype=torch.float32)
    best = torch.empty_like(labels)
    cross_entropy = base.new_zeros((), dtype=torch.float32)
    at_once = _CPU_ROWS if base.device.type == "cpu" else count
    for first in range(0, count, at_once):
        part = slice(first, first + at_once)
        logits = base[part].float()
        if bias is not None:
            logits += bias[part]
        best[part] = logits.argmax(dim=-1)
        log_p = torch.log_softmax(logits, dim=-1)
        p = log_p.exp()
        mine = rows[part]
        t = torch.softmax(target[mine].float(), dim=-1).mul_((1 - outside[mine])[:, None])
        difference = p - t
        # What the target gives to tokens out of reach counts too: p is 0 there.
        variation[part] = difference.abs().sum(dim=-1) + outside[mine]
        sign = difference.sign_()
        sign -= (p * sign).sum(dim=-1, keepdim=True)
        slot = slot_weights[part]
        ce_weights = torch.where(labels[part] >= 0, slot, torch.zeros_like(slot))
        known = labels[part].clamp_min(0)[:, None]
        cross_entropy -= (log_p.gather(1, known).squeeze(1) * ce_weights).sum()
        scaled = (weights.cross_entropy * ce_weights)[:, None]
        grad = sign.mul_((weights.variation * slot)[:, None]).add_(scaled).mul_(p)
        grad.scatter_add_(1, known, -scaled)
        base[part] = grad
    return Distribution(base, variation, best, cross_entropy)


def _target_logits(hidden: Tensor, head: Tensor) -> Tensor:
    """The target's logits over the draft vocabulary, [A, D] in the head's dtype."""
    return functional.linear(hidden.to(head.dtype), head)


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
