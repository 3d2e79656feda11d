"""One slot of the device's sequential stage: its logits after the token before it, and c_k."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dspark_backend.drafter.calibration import Calibration
from dspark_backend.drafter.config import DrafterConfig, HeadType
from dspark_backend.drafter.device_weights import DeviceDraftWeights


class DeviceSlots:
    """Any head's slots, for all blocks at once. ``ids`` int64 [D] are the target ids of the draft
    vocabulary; ``recurrent`` heads hand a state on from slot to slot. Launches work and waits for
    none of it; a block's bits are its own."""

    def __init__(
        self, weights: DeviceDraftWeights, config: DrafterConfig, calibration: Calibration
    ) -> None:
        self.ids = weights.ids
        self.recurrent = config.head is HeadType.RNN
        self._weights = weights
        self._config = config
        offsets = calibration.offsets or (0.0,) * config.block_size
        scale = np.array([calibration.temperatures, offsets])
        self._temperatures, self._offsets = torch.from_numpy(scale).to(weights.ids.device)

    def after(
        self, hidden: Tensor, base: Tensor, token: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Logits float32 [F, D] of a slot after ``token`` [F], W1 of that, and the state."""
        weights, row = self._weights.sequential, base.float()
        if weights is None:
            return row, None, None
        previous = weights.w1[token]
        latent, state = self._latent(hidden, previous, state)
        return row + weights.w2(latent).float(), previous, state

    def _latent(
        self, hidden: Tensor, previous: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        weights = self._weights.sequential
        if weights is None or weights.inner is None:
            return previous, None
        if self._config.head is HeadType.GATED:
            gate = weights.inner(torch.cat([hidden, previous], dim=1)).float().sigmoid()
            return (gate * previous.float()).to(previous.dtype), None
        before = torch.zeros_like(previous).float() if state is None else state
        joint = weights.inner(torch.cat([before.to(previous.dtype), previous, hidden], dim=1))
        gate, candidate, output = joint.float().chunk(3, dim=1)
        kept = gate.sigmoid()
        return output.tanh().to(previous.dtype), kept * before + (1 - kept) * candidate.tanh()

    def confidence(self, hidden: Tensor, previous: Tensor | None, slots: int | slice) -> Tensor:
        """Calibrated c_k float64 [...], ``hidden`` being [..., d] of ``slots``; 1 where the drafter
        has no such head: it never says to stop."""
        vector = self._weights.confidence
        if vector is None:
            return hidden.new_ones(hidden.shape[:-1], dtype=torch.float64)
        x = hidden
        if self._config.confidence_with_markov and previous is not None:
            x = torch.cat([hidden, previous], dim=-1)
        logits = (x.double() * vector).sum(dim=-1) + self._weights.confidence_bias
        scaled: Tensor = logits / self._temperatures[slots] + self._offsets[slots]
        return scaled.sigmoid()
