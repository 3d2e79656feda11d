"""Many small arrays to the device in one copy, and without waiting for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_DTYPES = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float64): torch.float64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.float32): torch.float32,
}


def upload(arrays: Mapping[str, NDArray[Any]], device: torch.device) -> dict[str, Tensor]:
    """``arrays`` (int64, float64, int32 or float32, of any shape) as tensors on ``device``, by the
    same names. They lie in one allocation, which lives as long as one of them does.

    Raises KeyError for an array of another dtype.
    """
    # Wide numbers first: each then begins at a multiple of its own width.
    names = sorted(arrays, key=lambda name: -arrays[name].itemsize)
    pieces = [np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8) for name in names]
    packed = torch.from_numpy(np.concatenate(pieces)) if pieces else torch.empty(0)
    if device.type == "cuda":
        packed = packed.pin_memory()  # else the copy would wait for what the device still does
    there = packed.to(device, non_blocking=True)
    tensors, at = {}, 0
    for name, piece in zip(names, pieces, strict=True):
        array = arrays[name]
        tensors[name] = there[at : at + len(piece)].view(_DTYPES[array.dtype]).view(array.shape)
        at += len(piece)
    return tensors
