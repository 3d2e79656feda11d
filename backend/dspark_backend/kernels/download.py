"""Many tensors to the host in one copy: the host waits for the device once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def download(tensors: Sequence[Tensor]) -> list[NDArray[Any]]:
    """``tensors``, all of one device, as arrays of the same shapes and dtypes (those that numpy
    has). Waits for the device, unless there are none."""
    if not tensors:
        return []
    # Wide numbers first: each then begins at a multiple of its own width.
    order = sorted(range(len(tensors)), key=lambda i: -tensors[i].itemsize)
    packed = [tensors[i].contiguous().view(-1).view(torch.uint8) for i in order]
    here = torch.cat(packed).cpu().numpy()
    arrays: dict[int, NDArray[Any]] = {}
    at = 0
    for i, piece in zip(order, packed, strict=True):
        own = here[at : at + len(piece)].view(torch.empty(0, dtype=tensors[i].dtype).numpy().dtype)
        arrays[i] = own.reshape(tuple(tensors[i].shape))
        at += len(piece)
    return [arrays[i] for i in range(len(tensors))]
