"""The linear layers of a target on a device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

# Which product torch picks, and so a row's bits, depends on the number of rows: it always gets this
# many. The weights are read once for each; up to here a product is bound by reading them.
ROWS = 64


class DeviceLinear:
    """``x[R, K] @ W.T + b`` in the weight's dtype; a row's bits depend on that row only."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int = ROWS) -> None:
        """``weight`` [N, K], ``bias`` [N] of the same dtype; ``rows`` that a product has."""
        self.weight = weight
        self._bias = bias
        self._rows = rows

    @property
    def channels(self) -> int:
        """N."""
        return int(self.weight.shape[0])

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` [R, K] of the weight's dtype -> [R, N]."""
        count = len(x)
        missing = -count % self._rows
        padded = functional.pad(x, (0, 0, 0, missing)) if missing else x
        pieces = [
            functional.linear(p, self.weight, self._bias) for p in torch.split(padded, self._rows)
        ]
        whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return whole[:count]
