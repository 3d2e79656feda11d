"""Bias and penalties on the device: single logits that are moved before anything looks at them.

As ``processors.py`` does on the CPU, operation by operation, so that the bits are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspark_backend.sampling.verifier import Question

Arrays = dict[str, NDArray[Any]]


def rewriting(questions: Sequence[Question]) -> Arrays:
    """What the parameters of ``questions`` move, for :func:`rewritten`; empty where nothing is.

    ``bias_at`` int64 [2, n] (rows, token ids) with ``bias`` float32 [n]; ``penalty_at`` int64
    [2, m] with ``penalty`` float32 [4, m]: repetition, frequency, presence, occurrences.
    """
    bias_at, bias = [np.zeros((2, 0), np.int64)], [np.zeros(0, np.float32)]
    penalty_at, penalty = [np.zeros((2, 0), np.int64)], [np.zeros((4, 0), np.float32)]
    row = 0
    for question in questions:
        params = question.sampler.params
        biased = np.array([*params.logit_bias], np.int64)
        moved = np.array([*params.logit_bias.values()], np.float32)
        strengths = np.array(
            [params.repetition_penalty, params.frequency_penalty, params.presence_penalty],
            np.float32,
        )
        for ids, occurrences in question.sampler.counted(question.drafts):
            bias_at.append(np.stack([np.full_like(biased, row), biased]))
            bias.append(moved)
            penalty_at.append(np.stack([np.full_like(ids, row), ids]))
            each = np.broadcast_to(strengths[:, None], (3, len(ids)))
            penalty.append(np.concatenate([each, occurrences[None]]))
            row += 1
    arrays: Arrays = {}
    if any(len(values) for values in bias):
        arrays |= {"bias_at": np.concatenate(bias_at, 1), "bias": np.concatenate(bias)}
    if any(at.shape[1] for at in penalty_at):
        arrays |= {
            "penalty_at": np.concatenate(penalty_at, 1),
            "penalty": np.concatenate(penalty, 1),
        }
    return arrays


def rewritten(logits: Tensor, there: dict[str, Tensor]) -> Tensor:
    """``logits`` [R, V] as float32, moved as :func:`rewriting` said, whose arrays are ``there``."""
    moved = logits.float()
    if "bias" not in there and "penalty" not in there:
        return moved
    moved = moved.clone() if moved is logits else moved
    if "bias" in there:
        rows, ids = there["bias_at"]
        moved[rows, ids] = moved[rows, ids] + there["bias"]
    if "penalty" in there:
        rows, ids = there["penalty_at"]
        repetition, frequency, presence, occurrences = there["penalty"]
        values = moved[rows, ids]
        values = torch.where(values < 0, values * repetition, values / repetition)
        values = values - frequency * occurrences
        moved[rows, ids] = values - presence * (occurrences > 0)
    return moved
