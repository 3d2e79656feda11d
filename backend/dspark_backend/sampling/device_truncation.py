"""Top-k, top-p and min-p on the device, for all rows that ask for it at once.

The definitions are those of ``truncation.py``: each keeps a level set, and sees what the one before
it left over. A row's cutoffs do not depend on the other rows: sorting is exact, and the mass of a
nucleus is summed in integers, whose sum has no order. The CPU sums in floating point: there, a
token at the very edge of a nucleus may fall to the other side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspark_backend.kernels.contract import Masks
from dspark_backend.request import SamplingParams
from dspark_backend.sampling.verifier import Question

Arrays = dict[str, NDArray[Any]]

# The weight of the most likely token: 2**22 tokens of it do not overflow the sum.
_ONE = float(2**40)


def truncation(questions: Sequence[Question]) -> Arrays:
    """The rows that are to be truncated and how, for :func:`truncated`; empty where none is.

    ``cut_rows`` and ``cut_top_k`` int64 [T] (k 0: off), ``cut_top_p`` and ``cut_min_p`` float64
    [T], ``cut_temperature`` float32 [T].
    """
    rows: list[int] = []
    cuts: list[SamplingParams] = []
    first = 0
    for question in questions:
        params = question.sampler.params
        if _truncates(params):
            rows += range(first, first + question.rows)
            cuts += [params] * question.rows
        first += question.rows
    if not rows:
        return {}
    return {
        "cut_rows": np.array(rows, np.int64),
        "cut_top_k": np.array([params.top_k for params in cuts], np.int64),
        "cut_top_p": np.array([params.top_p for params in cuts], np.float64),
        "cut_min_p": np.array([params.min_p for params in cuts], np.float64),
        "cut_temperature": np.array([params.temperature for params in cuts], np.float32),
    }


def truncated(logits: Tensor, masks: Masks | None, there: dict[str, Tensor]) -> Tensor:
    """``logits`` [R, V] float32 without what :func:`truncation` cuts (-inf), whose arrays are
    ``there``: after the ``masks`` and over the temperature."""
    if "cut_rows" not in there:
        return logits
    rows = there["cut_rows"]
    own = logits[rows]
    kept = own / there["cut_temperature"][:, None]
    if masks is not None:
        kept = kept.masked_fill(~_legal(masks, rows, logits.shape[1]), -torch.inf)
    cutoffs = _cutoffs(kept, there)
    out = logits.clone()
    out[rows] = own.masked_fill(~(kept >= cutoffs[:, None]), -torch.inf)
    return out


def _cutoffs(scaled: Tensor, there: dict[str, Tensor]) -> Tensor:
    """The smallest logit over temperature that survives all three, float32 [T]; the level sets lie
    in one another, so it is the largest of the cutoffs. NaN for a row with a NaN: nothing does."""
    ordered = scaled.sort(dim=1, descending=True).values
    peak, last = ordered[:, :1], ordered.shape[1] - 1
    k = there["cut_top_k"]
    at_k = ordered.gather(1, (k - 1).clamp(0, last)[:, None])
    cutoff = torch.where(k[:, None] > 0, at_k, -torch.inf)
    head = ordered.masked_fill(~(ordered >= cutoff), -torch.inf)
    weights = ((head - peak).double().exp() * _ONE).round().long()
    mass = weights.cumsum(dim=1).double()
    p = there["cut_top_p"][:, None]
    ahead = (mass < p * mass[:, -1:]).sum(dim=1, keepdim=True).clamp(max=last)
    cutoff = torch.where(p < 1.0, head.gather(1, ahead), cutoff)
    least = (peak.double() + there["cut_min_p"][:, None].log()).float()
    cutoff = torch.where(cutoff >= least, cutoff, least)
    return torch.where(torch.isfinite(peak), cutoff, torch.nan)[:, 0]


def _legal(masks: Masks, rows: Tensor, vocab: int) -> Tensor:
    """Bool [T, V]: what the masks of ``rows`` allow."""
    of_row = masks.of_row[rows].long()
    ids = torch.arange(vocab, device=rows.device)
    inside = ids < 32 * masks.words.shape[1]
    words = masks.words[of_row.clamp(min=0)][:, torch.where(inside, ids >> 5, 0)]
    legal = (words >> (ids & 31) & 1).bool() & inside
    return legal | (of_row < 0)[:, None]


def _truncates(params: SamplingParams) -> bool:
    cuts = params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0
    return params.temperature > 0.0 and cuts
