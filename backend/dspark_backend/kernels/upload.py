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

_ALIGNMENT = 16  # bytes

Arrays = Mapping[str, NDArray[Any]]


def upload(arrays: Arrays, device: torch.device) -> dict[str, Tensor]:
    """``arrays`` (int64, float64, int32 or float32, of any shape) as tensors on ``device``, by the
    same names. They lie in one allocation, which lives as long as one of them does.

    Raises KeyError for an array of another dtype.
    """
    return Mailbox(arrays, device).tensors


class Mailbox:
    """``tensors`` on the device that hold ``arrays``, and later others of the same shapes: what
    reads them there, such as a recorded graph, finds those in the same place."""

    def __init__(self, arrays: Arrays, device: torch.device) -> None:
        self._names = list(arrays)
        self._shapes = [(arrays[name].shape, arrays[name].dtype) for name in self._names]
        self._on_gpu = device.type == "cuda"
        self._there = self._packed(arrays).to(device, non_blocking=True)
        self.tensors: dict[str, Tensor] = {}
        at = 0
        for name in self._names:
            array = arrays[name]
            piece = self._there[at : at + array.nbytes].view(_DTYPES[array.dtype])
            self.tensors[name] = piece.view(array.shape)
            at += _aligned(array.nbytes)

    def refill(self, arrays: Arrays) -> None:
        """Put ``arrays`` in the place of what is there. Raises ValueError for other names, shapes
        or dtypes."""
        given = [(arrays[name].shape, arrays[name].dtype) for name in self._names if name in arrays]
        if len(arrays) != len(self._names) or given != self._shapes:
            raise ValueError(f"arrays of {self._shapes} fit in here, not {given}")
        self._there.copy_(self._packed(arrays), non_blocking=True)

    def _packed(self, arrays: Arrays) -> Tensor:
        size = sum(_aligned(arrays[name].nbytes) for name in self._names)
        packed_bytes = np.zeros(max(size, _ALIGNMENT), np.uint8)
        at = 0
        for name in self._names:
            piece = np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8)
            packed_bytes[at : at + len(piece)] = piece
            at += _aligned(len(piece))
        packed = torch.from_numpy(packed_bytes)
        # Pinned: else the copy would wait for what the device still does.
        return packed.pin_memory() if self._on_gpu else packed


def _aligned(size: int) -> int:
    """Bytes up to where the next array begins: a kernel is compiled for pointers to multiples of 16
    bytes or for others, and none should be compiled anew for the shapes of a step."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT
