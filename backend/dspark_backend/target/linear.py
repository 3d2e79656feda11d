"""The two kinds of linear layer a target is made of: int8 weights, or floating point by torch."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from dspark_backend.kernels.linear.cpu import linear_int8

_NO_BIAS = np.zeros(0, np.float32)

# The bits of torch's products depend on the number of rows, so they always get this many.
TORCH_ROWS = 8


class Linear(Protocol):
    """``out[R, N] = x[R, K] @ W.T + b`` in float32; a row's bits depend on that row only."""

    @property
    def channels(self) -> int: ...

    def __call__(self, x: NDArray[np.float32], out: NDArray[np.float32]) -> None: ...


class Int8Linear:
    """int8 weights per output channel, activations in ``planes`` bytes (``kernels/linear``)."""

    def __init__(
        self,
        weight: NDArray[np.int8],
        scale: NDArray[np.float32],
        sums: NDArray[np.int32],
        bias: NDArray[np.float32] | None,
        planes: int,
    ) -> None:
        self.channels = int(scale.shape[0])
        self._weight, self._scale, self._sums = weight, scale, sums
        self._bias = _NO_BIAS if bias is None else bias
        self._planes = planes

    def __call__(self, x: NDArray[np.float32], out: NDArray[np.float32]) -> None:
        linear_int8(x, self._weight, self._scale, self._sums, self._bias, self._planes, out)


class TorchLinear:
    """Weights and activations of one float dtype through torch, always :data:`TORCH_ROWS` rows a
    call."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.channels = int(weight.shape[0])
        self._weight = weight
        self._bias = None if bias is None else bias.to(weight.dtype)

    def __call__(self, x: NDArray[np.float32], out: NDArray[np.float32]) -> None:
        rows, result = torch.from_numpy(x), torch.from_numpy(out)
        piece = torch.zeros((TORCH_ROWS, x.shape[1]), dtype=self._weight.dtype)
        for first in range(0, rows.shape[0], TORCH_ROWS):
            count = min(TORCH_ROWS, rows.shape[0] - first)
            piece[:count] = rows[first : first + count]
            product = torch.nn.functional.linear(piece, self._weight, self._bias)
            result[first : first + count] = product[:count]
