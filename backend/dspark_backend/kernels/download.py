"""Many tensors to the host in one copy: the host waits for the device once, then or later."""

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
    packed = _Packed(tensors)
    return packed.arrays(packed.there.cpu())


class Download:
    """``tensors``, at least one, on their way as by :func:`download`, while the host goes on. Later
    work of the device may write to them."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._packed = _Packed(tensors)
        there = self._packed.there
        self._here = there
        self._done: torch.cuda.Event | None = None
        if there.is_cuda:
            # Pinned: else the copy would wait for what the device still does.
            self._here = torch.empty(there.shape, dtype=there.dtype, pin_memory=True)
            self._here.copy_(there, non_blocking=True)
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record(torch.cuda.current_stream(there.device))

    def arrays(self) -> list[NDArray[Any]]:
        """What :func:`download` gives. Waits for the copy."""
        if self._done is not None:
            self._done.synchronize()
        return self._packed.arrays(self._here)


class _Packed:
    """``there`` uint8 [bytes] are all of ``tensors``, where they lie."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        # Wide numbers first: each then begins at a multiple of its own width.
        self._order = sorted(range(len(tensors)), key=lambda i: -tensors[i].itemsize)
        self._kinds = [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
        pieces = [tensors[i].contiguous().view(-1).view(torch.uint8) for i in self._order]
        self._sizes = [len(piece) for piece in pieces]
        self.there = torch.cat(pieces)

    def arrays(self, here: Tensor) -> list[NDArray[Any]]:
        """The tensors as arrays, ``here`` being what was packed, on the host."""
        whole = here.numpy()
        arrays: dict[int, NDArray[Any]] = {}
        at = 0
        for i, size in zip(self._order, self._sizes, strict=True):
            shape, dtype = self._kinds[i]
            own = whole[at : at + size].view(torch.empty(0, dtype=dtype).numpy().dtype)
            arrays[i] = own.reshape(shape)
            at += size
        return [arrays[i] for i in range(len(arrays))]
