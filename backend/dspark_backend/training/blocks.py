"""A training batch: random anchors of several examples and what their slots are to predict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark_backend.training.features import Example


@dataclass(frozen=True, slots=True)
class Blocks:
    """Blocks of B examples, A anchors each, g slots.

    ``features`` float32 [B, T, feature_size], zeros past an example's end; ``anchors`` and
    ``anchor_tokens`` int64 [B, A]; ``tokens`` int64 [B, A, g]: the rollout's token of every slot;
    ``previous`` int64 [B, A, g]: the one before it; ``rows`` int64 [B, A, g]: which row of the
    example's ``hidden`` predicts the slot; ``valid`` bool [B, A, g]: the slot lies in the answer.
    Values of slots that are not valid are in range and mean nothing.
    """

    examples: Sequence[Example]
    features: Tensor
    anchors: Tensor
    anchor_tokens: Tensor
    tokens: Tensor
    previous: Tensor
    rows: Tensor
    valid: Tensor


def sample_blocks(
    examples: Sequence[Example], anchors: int, block_size: int, generator: torch.Generator
) -> Blocks:
    """Random anchors wherever the anchor and the next token belong to the answer.

    An example with fewer such places than ``anchors`` fills its row with blocks that are not
    valid. Examples need at least two answer tokens (:func:`trainable`).
    """
    places = torch.zeros(len(examples), anchors, dtype=torch.int64)
    real = torch.zeros(len(examples), anchors, dtype=torch.bool)
    for index, example in enumerate(examples):
        count = len(example.tokens) - 1 - example.first
        drawn = torch.randperm(count, generator=generator)[:anchors] + example.first
        places[index] = example.first
        places[index, : len(drawn)] = drawn
        real[index, : len(drawn)] = True
    return blocks_at(examples, places, real, block_size)


def blocks_at(
    examples: Sequence[Example], anchors: Tensor, real: Tensor, block_size: int
) -> Blocks:
    """The blocks of given anchors; ``anchors`` int64 [B, A], ``real`` bool [B, A]."""
    longest = max(len(example.tokens) for example in examples)
    width = examples[0].features.shape[1]
    features = torch.zeros(len(examples), longest, width)
    padded = torch.zeros(len(examples), longest, dtype=torch.int64)
    for index, example in enumerate(examples):
        features[index, : len(example.tokens)] = example.features
        padded[index, : len(example.tokens)] = example.tokens
    ends = torch.tensor([len(example.tokens) for example in examples])[:, None, None]
    firsts = torch.tensor([example.first for example in examples])[:, None, None]
    positions = anchors[:, :, None] + torch.arange(1, block_size + 1)
    valid = (positions < ends) & real[:, :, None]
    inside = positions.minimum(ends - 1)
    return Blocks(
        examples=examples,
        features=features,
        anchors=anchors,
        anchor_tokens=padded.gather(1, anchors),
        tokens=_pick(padded, inside),
        previous=_pick(padded, inside - 1),
        rows=inside - firsts,
        valid=valid,
    )


def trainable(example: Example) -> bool:
    """Whether there is a place for an anchor: two answer tokens at least."""
    return len(example.tokens) - example.first >= 2


def _pick(padded: Tensor, positions: Tensor) -> Tensor:
    batch = positions.shape[0]
    return padded.gather(1, positions.reshape(batch, -1)).reshape(positions.shape)
