"""What the contracts of the device kernels have in common: checks of tensors, and grammar masks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class Masks:
    """Grammar masks, one bit a token, lowest bit first, 1 = legal.

    ``words`` int32 [M, W]; ids past the last word are illegal. ``of_row`` int32 [R] is the row of
    ``words`` that holds for a row of logits, -1 where everything is legal.
    """

    words: Tensor
    of_row: Tensor

    def expect(self, rows: int, device: torch.device) -> None:
        """Raises ValueError where these are no masks of ``rows`` rows on ``device``."""
        expect("masks.words", self.words, device, torch.int32, *self.words.shape[:2])
        expect("masks.of_row", self.of_row, device, torch.int32, rows)


def mask_arguments(masks: Masks | None, stand_in: Tensor) -> tuple[Tensor, Tensor, int]:
    """Words, row of words, words a row: what a kernel is given. 0 words where there are no masks,
    and ``stand_in`` where it is not read."""
    if masks is None:
        return stand_in, stand_in, 0
    return masks.words, masks.of_row, masks.words.shape[1]


def expect(
    name: str, tensor: Tensor, device: torch.device, dtype: torch.dtype, *shape: int
) -> None:
    """Raises ValueError where ``tensor`` is not as named, contiguous and on ``device``."""
    if tensor.dtype != dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous():
        raise ValueError(f"{name} is {dtype} {list(shape)} and contiguous, not {describe(tensor)}")
    expect_on(name, tensor, device)


def expect_on(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raises ValueError where ``tensor`` is not on ``device``, that of the call's first tensor."""
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the rest on {device}: move it there")


def describe(tensor: Tensor) -> str:
    """dtype, shape and strides, for an error."""
    return f"{tensor.dtype} {list(tensor.shape)}, strides {list(tensor.stride())}"
