"""Decoding replayed on rollouts: which drafts the drafter would have made, which would stand.

A rollout's own tokens are what the target emits, so a draft stands iff it is the rollout's token
there: at temperature 0 that is greedy speculation, on sampled rollouts it is coupled sampling
(DSPARK.md, section 6). After every cycle the features of what was accepted are the rollout's own,
hence all cycles can be drafted at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspark_backend.drafter.calibration import Calibration
from dspark_backend.drafter.model import DraftModel
from dspark_backend.training.blocks import blocks_at, trainable
from dspark_backend.training.features import Example

_ANCHORS_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Cycles:
    """The cycles of decoding one rollout with blocks of g drafts.

    ``accepted`` int64 [C]: drafts that stood; ``offered`` int64 [C]: slots that lay inside the
    answer; ``confidence_logits`` float64 [C, g]. ``tokens`` is what the C cycles emitted.
    """

    source: str
    kind: str
    tokens: int
    accepted: NDArray[np.int64]
    offered: NDArray[np.int64]
    confidence_logits: NDArray[np.float64]


def replay(model: DraftModel, example: Example, d2t: Tensor | None) -> Cycles | None:
    """Decode the rollout again, speculatively; None where it has no two answer tokens."""
    if not trainable(example):
        return None
    drafts, logits = draft_everywhere(model, example, d2t)
    tokens = example.tokens.numpy()
    end = len(tokens)
    anchor = example.first
    accepted, offered, rows = [], [], []
    while anchor + 1 < end:
        row = anchor - example.first
        inside = min(drafts.shape[1], end - 1 - anchor)
        follows = tokens[anchor + 1 : anchor + 1 + inside]
        matches = drafts[row, :inside] == follows
        stood = int(matches.argmin()) if not matches.all() else inside
        accepted.append(stood)
        offered.append(inside)
        rows.append(row)
        anchor += stood + 1
    rollout = example.rollout
    return Cycles(
        rollout.source,
        rollout.kind.value,
        end - 1 - example.first,
        np.array(accepted, np.int64),
        np.array(offered, np.int64),
        logits[rows],
    )


@torch.no_grad()
def draft_everywhere(
    model: DraftModel, example: Example, d2t: Tensor | None
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Greedy drafts from every answer position but the last: target ids [N, g], logits of c_k."""
    device = model.lm_head.device
    places = torch.arange(example.first, len(example.tokens) - 1)
    mapping = None if d2t is None else d2t.to(device)
    drafts, sure = [], []
    for piece in torch.split(places, _ANCHORS_AT_ONCE):
        real = torch.ones(1, len(piece), dtype=torch.bool)
        blocks = blocks_at([example], piece[None], real, model.config.block_size)
        anchor_tokens = blocks.anchor_tokens.to(device)
        hidden = model.hidden(blocks.features.to(device), anchor_tokens, blocks.anchors.to(device))
        tokens, confidence = model.chain(hidden[0], anchor_tokens[0], mapping)
        drafts.append(tokens.cpu())
        sure.append(confidence.double().cpu())
    return torch.cat(drafts).numpy(), torch.cat(sure).numpy()


def accepted_length(cycles: Sequence[Cycles]) -> float:
    """Tokens a cycle, the correction or bonus included; 0.0 without cycles."""
    count = sum(len(each.accepted) for each in cycles)
    return sum(each.tokens for each in cycles) / count if count else 0.0


def conditional_acceptance(cycles: Sequence[Cycles], block_size: int) -> list[float]:
    """Of the slots reached (all drafts before stood, inside the answer), the share that stood."""
    rates = []
    for k in range(block_size):
        reached = stood = 0
        for each in cycles:
            here = (each.accepted >= k) & (each.offered > k)
            reached += int(here.sum())
            stood += int((each.accepted[here] > k).sum())
        rates.append(stood / reached if reached else 0.0)
    return rates


def survivals(
    cycles: Sequence[Cycles], calibration: Calibration
) -> list[tuple[NDArray[np.float64], NDArray[np.bool_]]]:
    """For every slot k: predicted cumulative survival and whether slots 1..k stood.

    Over the cycles in which slot k lay inside the answer.
    """
    slots = range(len(calibration.temperatures))
    if not cycles:
        empty = np.zeros(0)
        return [(empty, empty.astype(np.bool_)) for _ in slots]
    logits = np.concatenate([each.confidence_logits for each in cycles])
    accepted = np.concatenate([each.accepted for each in cycles])
    offered = np.concatenate([each.offered for each in cycles])
    survival = np.ones(len(logits))
    pairs = []
    for k in slots:
        survival = survival * calibration.confidence(k, logits[:, k])
        inside = offered > k
        pairs.append((survival[inside], accepted[inside] > k))
    return pairs
