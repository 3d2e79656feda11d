"""What the sequential stage is given: the base logits of all requests' blocks, and the head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dspark_backend.kernels.contract import FLOATS, Masks, describe, expect


@dataclass(frozen=True, slots=True)
class Head:
    """``w1`` [V, r] and ``w2`` [D, r] of one dtype, bfloat16, float16 or float32; ``ids`` int32
    [D], ascending, the token id of each draft id, None where D = V and they are the same."""

    w1: Tensor
    w2: Tensor
    ids: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Blocks:
    """The blocks of B requests, g slots each.

    ``base`` [B, g, D] bfloat16, float16 or float32, U of DSPARK.md, section 1; ``anchors`` int32
    [B], token ids in [0, V). ``masks.of_row`` is [B * g]: slot k of request b is row ``b g + k``;
    ``masks.words`` are over token ids, not draft ids. Nothing is written to.
    """

    base: Tensor
    anchors: Tensor
    head: Head
    masks: Masks | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for shapes, dtypes or devices that break the contract. Values lie on
        the device and are not looked at."""
        base, head = self.base, self.head
        if base.dim() != 3 or base.dtype not in FLOATS or 0 in base.shape[1:]:
            raise ValueError(
                f"base is [B, g, D] of bfloat16, float16 or float32, not {describe(base)}"
            )
        if head.w1.dim() != 2 or head.w1.dtype not in FLOATS or 0 in head.w1.shape:
            raise ValueError(
                f"w1 is [V, r] of bfloat16, float16 or float32, not {describe(head.w1)}"
            )
        (requests, size, drafts), (vocab, rank) = base.shape, head.w1.shape
        expect("base", base, base.device, base.dtype, *base.shape)
        expect("anchors", self.anchors, base.device, torch.int32, requests)
        expect("w1", head.w1, base.device, head.w1.dtype, vocab, rank)
        expect("w2", head.w2, base.device, head.w1.dtype, drafts, rank)
        if head.ids is not None:
            expect("ids", head.ids, base.device, torch.int32, drafts)
        elif drafts != vocab:
            raise ValueError(
                f"{drafts} draft ids stand for {vocab} token ids: say in head.ids which for which"
            )
        if self.masks is not None:
            self.masks.expect(requests * size, base.device)
