"""Slots of guided blocks, each after the token that was decided before it, or else guessed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dspark_backend.drafter.device_slots import DeviceSlots

Guessed = tuple[Tensor, Tensor, Tensor]
"""Of the N slots that guides are to decide about: logits float32 [N, D], c_k float64 [N], and the
tokens int64 [N] that the slots after them were computed for."""


def guessed(
    slots: DeviceSlots,
    there: Mapping[str, Tensor],
    first: int = 0,
    states: list[Tensor | None] | None = None,
) -> Guessed:
    """Launch the slots from ``first`` on; ``states`` [g + 1], the recurrent ones before each slot,
    are read there and written behind it.

    ``there``: ``hidden`` [F, g, d], ``base`` [F, g, D] and ``anchors`` int64 [F]; ``tokens`` int64
    [F, g] that are decided, -1 where none is; ``asked`` int64 [N], (k - first) * F + i for slot k
    of block i. Where masks are known, ``words`` int32 [M, W] of the blocks ``word_rows`` int64 [M],
    and ``masked_at`` int64 [F], the slot that each is for, -1 for none.
    """
    given, every = there["tokens"], there["hidden"]
    size = given.shape[1]
    token = there["anchors"] if first == 0 else given[:, first - 1].clamp(min=0)
    illegal = _illegal(slots, there)
    state = None if states is None else states[first]
    logits, sure, tokens = [], [], []
    for k in range(first, size):
        hidden = every[:, k]
        row, previous, state = slots.after(hidden, there["base"][:, k], token, state)
        if states is not None:
            states[k + 1] = state
        logits.append(row)
        sure.append(slots.confidence(hidden, previous, k))
        if illegal is not None:
            row = row.masked_fill(illegal & (there["masked_at"] == k)[:, None], -torch.inf)
        token = torch.where(given[:, k] >= 0, given[:, k], slots.ids[row.argmax(1)])
        tokens.append(token)
    asked = there["asked"]
    return torch.cat(logits)[asked], torch.cat(sure)[asked], torch.cat(tokens)[asked]


def _illegal(slots: DeviceSlots, there: Mapping[str, Tensor]) -> Tensor | None:
    """Bool [F, D]: what the mask of a block's next slot rules out."""
    if "words" not in there:
        return None
    ids = slots.ids
    bits = there["words"][:, ids >> 5] >> (ids & 31) & 1
    illegal = torch.zeros(len(there["tokens"]), len(ids), dtype=torch.bool, device=ids.device)
    illegal[there["word_rows"]] = bits == 0
    return illegal
