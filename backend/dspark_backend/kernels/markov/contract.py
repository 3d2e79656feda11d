"""What the sequential stage is given: the base logits of all requests' blocks, and the head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dspark_backend.kernels.verify.contract import Masks

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


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
        if base.dim() != 3 or base.dtype not in _FLOATS or 0 in base.shape[1:]:
            raise ValueError(
                f"base is [B, g, D] of bfloat16, float16 or float32, not {_describe(base)}"
            )
        if head.w1.dim() != 2 or head.w1.dtype not in _FLOATS or 0 in head.w1.shape:
            raise ValueError(
                f"w1 is [V, r] of bfloat16, float16 or float32, not {_describe(head.w1)}"
            )
        (requests, size, drafts), (vocab, rank) = base.shape, head.w1.shape
        self._expect("base", base, base.dtype, *base.shape)
        self._expect("anchors", self.anchors, torch.int32, requests)
        self._expect("w1", head.w1, head.w1.dtype, vocab, rank)
        self._expect("w2", head.w2, head.w1.dtype, drafts, rank)
        if head.ids is not None:
            self._expect("ids", head.ids, torch.int32, drafts)
        elif drafts != vocab:
            raise ValueError(
                f"{drafts} draft ids stand for {vocab} token ids: say in head.ids which for which"
            )
        if self.masks is not None:
            words = self.masks.words
            self._expect("masks.words", words, torch.int32, *words.shape[:2])
            self._expect("masks.of_row", self.masks.of_row, torch.int32, requests * size)

    def _expect(self, name: str, tensor: Tensor, dtype: torch.dtype, *shape: int) -> None:
        if tensor.dtype != dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous():
            raise ValueError(
                f"{name} is {dtype} {list(shape)} and contiguous, not {_describe(tensor)}"
            )
        if tensor.device != self.base.device:
            raise ValueError(
                f"{name} is on {tensor.device}, base on {self.base.device}: move it there"
            )


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}, strides {list(tensor.stride())}"
